"""What a decode rank says to prefill ranks, and how sessions with them end."""

from __future__ import annotations

import logging
from collections import Counter

import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.lookup import DirectoryClient
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.messages import Abort, Bye, Message, encode, reason_text
from sglang_prfaas.transport.receive_session import PeerSession
from sglang_prfaas.transport.receive_table import ReceiveTable

logger = logging.getLogger(__name__)

FAREWELL_MS = 1000
"""How long the last messages of a session may take to leave."""


class ReceiveControl:
    """Speaks over the sessions' control sockets, which belong to `loop`.

    `say`, `say_again` and `mention` are called in the loop's thread, which owns the mailboxes. `say_soon`, `judge` and
    `lose` may be called from any: they take a session's lock, that of the table or of a transfer, one at a time, and
    leave to the loop what is to be said."""

    def __init__(self, table: ReceiveTable, clock: Clock, loop: ZmqLoop, directories: DirectoryClient) -> None:
        self._table = table
        self._clock = clock
        self._loop = loop
        self._directories = directories

    # --- from within the loop -------------------------------------------------------------------------------------

    def say(self, session: PeerSession, message: Message) -> None:
        """Say what has to arrive; kept until there is a control socket."""
        if session.control is None:
            session.unsent.append(message)
            return
        try:
            self._send(session, session.mailbox.post(encode(message), self._clock.now_s()))
        except LocalError as error:
            self.lose(session, str(error))

    def say_again(self, session: PeerSession, now_s: float, *, at_once: bool = False) -> None:
        """Say what has not arrived for a while, or `at_once` all that has not arrived."""
        for envelope in session.mailbox.resend(now_s, at_once=at_once):
            self._send(session, envelope)

    def mention(self, session: PeerSession, message: Message) -> None:
        """Say what needs no delivery."""
        self._send(session, session.mailbox.unnumbered(encode(message)))

    @staticmethod
    def _send(session: PeerSession, envelope: bytes) -> None:
        """Send on the control socket. What cannot be sent now is sent again later."""
        if session.control is None or session.control.closed:
            return
        try:
            session.control.send(envelope, zmq.NOBLOCK)
        except zmq.Again:
            pass

    def _end(self, session: PeerSession, ended: list[tuple[int, int]]) -> None:
        """Tell prefill, if it still listens, which requests ended with the session; then close the control socket."""
        if session.control is None:
            return
        session.control.setsockopt(zmq.LINGER, FAREWELL_MS)
        for room, transfer_id in ended:
            self.say(session, Abort(room, reason_text(session.failure), transfer_id))
        self.say(session, Bye(reason_text(session.failure)))
        self._loop.remove(session.control)

    # --- from any thread ------------------------------------------------------------------------------------------

    def say_soon(self, session: PeerSession, message: Message) -> None:
        """Have the loop `say` it."""
        self._loop.call(lambda: self.say(session, message))

    def judge(self, session: PeerSession) -> bool:
        """Whether the session goes on."""
        with session.lock:
            why = session.health.verdict(self._clock.now_s())
        if why:
            self.lose(session, why)
        return not why

    def lose(self, session: PeerSession, reason: str) -> None:
        """Close a session: its transfers fail, its connections close. Idempotent."""
        with session.lock:
            if session.failure:
                return
            session.failure = f"{session}: {reason}"
            session.up = False
            session.health.lose()
            session.ended.set()
            items = list(session.incoming.values())
            ended = [(item.transfer.room, item.transfer.transfer_id) for item in items if item.transfer.live]
            unexpected = session.rooms - Counter(item.transfer.room for item in items)
            ended += [(room, 0) for room in unexpected.elements()]
            connections = list(session.connections.values())
        self._table.remove(session)
        self._directories.forget(session.address)
        for item in items:
            with item.transfer.lock:
                item.transfer.fail(session.failure)
        for connection in connections:
            connection.cut()
        self._loop.call(lambda: self._end(session, ended))
        if not self._table.closing:
            logger.warning("prfaas: session with %s", session.failure)
