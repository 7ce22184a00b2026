"""The sessions of a decode rank with prefill ranks, under one lock."""

from __future__ import annotations

import threading
from collections.abc import Callable

from sglang_prfaas.transport.receive_session import PeerSession


class ReceiveTable:
    """Sends nothing, and waits for nothing. `lock` guards all of it; methods take it, and may be called from any
    thread. A session's own lock is taken under it, never the other way round."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sessions: dict[tuple[str, int], PeerSession] = {}
        """Those that have not failed, by host and control port."""
        self.closing = False
        """Whether none is opened any more. Only ever set."""

    def close(self) -> list[PeerSession] | None:
        """Open none any more. Returns those of now, to end them; None where it was closed before."""
        with self.lock:
            if self.closing:
                return None
            self.closing = True
            return list(self.sessions.values())

    def standing(self) -> list[PeerSession]:
        """The sessions of now."""
        with self.lock:
            return list(self.sessions.values())

    def enter(
        self, host: str, control_port: int, room: int | None, make: Callable[[], PeerSession]
    ) -> tuple[PeerSession, bool]:
        """A request needs the session with a prefill rank: made where there is none. Returns it, and whether it is new
        and has to be opened; it is not where it has failed at once, because none is opened any more."""
        with self.lock:
            session = self.sessions.get((host, control_port))
            if session is not None and session.enter(room):
                return session, False
            session = make()
            if self.closing:
                session.failure = f"{session}: the decode server is stopping"
                return session, False
            session.enter(room)
            self.sessions[host, control_port] = session
            return session, True

    def remove(self, session: PeerSession) -> None:
        """A session has failed; another may have taken its place."""
        with self.lock:
            if self.sessions.get((session.host, session.control_port)) is session:
                del self.sessions[session.host, session.control_port]
