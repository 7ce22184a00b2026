"""Whom a prefill rank serves: its sessions with decode ranks, and the requests of both sides, under one lock."""

from __future__ import annotations

import threading

from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.core.link_counts import LinkCounts
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.link_counters import LinkCounters
from sglang_prfaas.transport.messages import Hello
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.rooms import Rooms
from sglang_prfaas.transport.send_session import SendSession


class Load(Struct, frozen=True):
    """How much a prefill rank serves. site_sessions: those of one site, as far as it is proved."""

    sessions: int
    connections: int
    site_sessions: int


class Ended(Struct, frozen=True):
    """What a session leaves behind that has ended."""

    transfers: list[OutgoingTransfer]
    connections: list[Connection]


class SendTable:
    """Sends nothing, and waits for nothing.

    `lock` guards all of it and, of its sessions, `links`, `transfers`, `health` and `closed`. Methods take it, where
    they do not say otherwise, and may be called from any thread; who deals with `links` or `health` of a session takes
    it, too, but for `Health.heard`. The lock of a transfer is never taken under it, nor the other way round."""

    def __init__(self, clock: Clock, waiting_timeout_s: float) -> None:
        self.lock = threading.Lock()
        self.sessions: dict[bytes, SendSession] = {}
        """Those that stand, by identity. Changed and iterated under the lock; a look at one needs none."""
        self.closing = False
        """Whether nothing is let in any more. Only ever set."""
        self._tokens: dict[bytes, SendSession] = {}
        self._farewells: dict[bytes, str] = {}
        """Why sessions ended whose decode ranks have yet to be told."""
        self._rooms = Rooms(clock, waiting_timeout_s)
        self._counters = LinkCounters()

    def close(self) -> list[OutgoingTransfer] | None:
        """Let nothing in any more. Returns every transfer, to end them; None where it was closed before."""
        with self.lock:
            if self.closing:
                return None
            self.closing = True
            return self._rooms.all()

    # --- sessions -------------------------------------------------------------------------------------------------

    def standing(self) -> list[SendSession]:
        """The sessions of now."""
        with self.lock:
            return list(self.sessions.values())

    def load(self, site: str) -> Load:
        """What is served now, and how much of it of decode ranks that have proved to be of `site`."""
        with self.lock:
            return Load(
                len(self.sessions),
                sum(session.hello.connections for session in self.sessions.values()),
                sum(session.site == site for session in self.sessions.values()),
            )

    def replaced(self, identity: bytes, hello: Hello) -> list[SendSession]:
        """The sessions that a new one takes the place of: of the same rank of the same server, where it has a name."""

        def same(other: Hello) -> bool:
            return bool(hello.server) and (other.site, other.server, other.rank) == (
                hello.site,
                hello.server,
                hello.rank,
            )

        with self.lock:
            return [s for i, s in self.sessions.items() if i == identity or same(s.hello)]

    def add(self, session: SendSession) -> None:
        """A decode rank is let in."""
        with self.lock:
            self.sessions[session.identity] = session
            self._tokens[session.token] = session

    def of_token(self, token: bytes) -> SendSession | None:
        """Whose data connection shows `token`. Under the lock."""
        return self._tokens.get(token)

    def lose(self, session: SendSession, why: str) -> Ended | None:
        """A session has ended, and its decode rank has yet to be told why. None where it had ended before."""
        with self.lock:
            if session.closed:
                return None
            session.closed = True
            if self.sessions.get(session.identity) is session:
                del self.sessions[session.identity]
            self._tokens.pop(session.token, None)
            self._counters.lost(session)
            self._farewells[session.identity] = why
            session.health.lose()
            return Ended(self._rooms.lost(session, why), [link.connection for link in session.links.values()])

    def farewell(self, identity: bytes) -> str:
        """Why the session of an identity has ended, as long as its decode rank has yet to be told; else empty."""
        with self.lock:
            return self._farewells.get(identity, "")

    def told(self, session: SendSession) -> None:
        """The decode rank is being told."""
        with self.lock:
            self._farewells.pop(session.identity, None)

    def counts(self, site: str) -> LinkCounts:
        """What went to a site so far."""
        with self.lock:
            return self._counters.of(site, self.sessions.values())

    # --- requests, see `Rooms` ------------------------------------------------------------------------------------

    def transfers(self) -> list[OutgoingTransfer]:
        """Of all requests."""
        with self.lock:
            return self._rooms.all()

    def open(self, room: int, share: int) -> OutgoingTransfer:
        """Prefill's own request has come. Raises LocalError where too many share the room."""
        with self.lock:
            return self._rooms.open(room, share)

    def home(self, transfer: OutgoingTransfer) -> SendSession | None:
        """The session a transfer goes to, once decode has asked for it."""
        with self.lock:
            return self._rooms.home(transfer)

    def asked_for(self, room: int, session: SendSession, transfer_id: int) -> OutgoingTransfer | None:
        """A decode rank asks for a room. None where its session has ended."""
        with self.lock:
            return None if session.closed else self._rooms.asked_for(room, session, transfer_id)

    def aborted(self, room: int, session: SendSession | None, transfer_id: int, reason: str) -> OutgoingTransfer | None:
        """Decode ended a request. Returns the transfer to fail, where there is one."""
        with self.lock:
            return self._rooms.aborted(room, session, transfer_id, reason)

    def forget(self, transfer: OutgoingTransfer) -> SendSession | None:
        """Drop a request that has ended. Returns the session it went to."""
        with self.lock:
            session = self._rooms.forget(transfer)
            if session is not None:
                self._counters.forgotten(session, transfer)
            return session

    def expire(self) -> list[tuple[OutgoingTransfer, SendSession, int]]:
        """Drop what has waited too long for prefill's own request; returns what decode ranks still wait for, with their
        sessions and transfer ids."""
        with self.lock:
            return self._rooms.expire()
