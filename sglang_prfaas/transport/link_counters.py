"""Counts of a mover's links, by the site they lead to. `SendTable` calls every method under its lock."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sglang_prfaas.core.link_counts import LinkCounts
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.transfer import State


class LinkCounters:
    """Of sessions and requests that have ended; what stands is added when one asks."""

    def __init__(self) -> None:
        self._ended: dict[str, LinkCounts] = {}

    def forgotten(self, session: SendSession, transfer: OutgoingTransfer) -> None:
        """A request of a session is over."""
        counts = self._of(session)
        counts.done += transfer.state is State.DONE
        counts.failed += transfer.state is State.FAILED
        counts.resent_chunks += transfer.resent_chunks
        counts.corrupt_chunks += transfer.corrupt_chunks
        codec = counts.codec(transfer.codec)
        codec.bytes += transfer.bytes
        codec.wire_bytes += transfer.wire_bytes

    def lost(self, session: SendSession) -> None:
        """A session is over."""
        counts = self._of(session)
        counts.sessions_ended += 1
        counts.reconnects += session.health.reconnects

    def of(self, site: str, sessions: Iterable[SendSession]) -> LinkCounts:
        """Of the link to a site, with the sessions that stand, of whatever site."""
        counts = msgspec.convert(msgspec.to_builtins(self._ended.get(site, LinkCounts())), LinkCounts)
        for session in sessions:
            if session.hello.site == site:
                counts.reconnects += session.health.reconnects
                counts.codec(session.codec.name).sessions += 1
        return counts

    def _of(self, session: SendSession) -> LinkCounts:
        return self._ended.setdefault(session.hello.site, LinkCounts())
