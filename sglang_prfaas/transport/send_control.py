"""What a prefill rank says to decode ranks, and how transfers and sessions with them end."""

from __future__ import annotations

import logging

import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.mailbox import seal
from sglang_prfaas.transport.messages import Failed, Message, Refuse, encode, reason_text
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.send_table import SendTable
from sglang_prfaas.transport.transfer import State

logger = logging.getLogger(__name__)


class SendControl:
    """Speaks over `sock`, a ROUTER that belongs to `loop`.

    `reply`, `say`, `say_again` and `stands` are called in the loop's thread, which owns the mailboxes. `abort`,
    `report` and `lose` may be called from any: they take the lock of a transfer or that of the table, never both, and
    leave to the loop what is to be said."""

    def __init__(self, table: SendTable, clock: Clock, loop: ZmqLoop, sock: zmq.Socket[bytes]) -> None:
        self._table = table
        self._clock = clock
        self._loop = loop
        self._sock = sock

    # --- from within the loop -------------------------------------------------------------------------------------

    def reply(self, identity: bytes, message: Message) -> None:
        """Say what needs no delivery; dropped where the peer is gone or does not read."""
        session = self._table.sessions.get(identity)
        body = encode(message)
        envelope = session.mailbox.unnumbered(body) if session is not None else seal(body)
        self._send(identity, envelope)

    def say(self, session: SendSession, message: Message) -> None:
        """Say what has to arrive."""
        if session.closed:
            return
        try:
            envelope = session.mailbox.post(encode(message), self._clock.now_s())
        except LocalError as error:
            self.lose(session, str(error))
            return
        self._send(session.identity, envelope)

    def say_again(self, session: SendSession, now_s: float) -> None:
        """Say what has not arrived for a while."""
        for envelope in session.mailbox.resend(now_s):
            self._send(session.identity, envelope)

    def stands(self, descriptor: int) -> bool:
        """Whether the control connection stands that has this descriptor."""
        return self._loop.connected(self._sock, descriptor)

    def _send(self, identity: bytes, envelope: bytes) -> None:
        self._sock.send_multipart([identity, envelope], zmq.NOBLOCK)

    def _refuse(self, session: SendSession, why: str) -> None:
        """The session is over; another of the same name may have taken its place."""
        self._table.told(session)
        if session.identity not in self._table.sessions:
            self.reply(session.identity, Refuse(reason_text(why)))

    # --- from any thread ------------------------------------------------------------------------------------------

    def abort(self, transfer: OutgoingTransfer, reason: str) -> None:
        """End a transfer and tell decode why. From here on its pages are not read any more. Idempotent."""
        with transfer.lock:
            transfer.fail(reason)
        self.report(transfer)

    def report(self, transfer: OutgoingTransfer) -> None:
        """Tell decode of a failure that it does not know of yet."""
        with transfer.lock:
            expected = transfer.expected
            if transfer.state is not State.FAILED or transfer.peer_knows or expected is None:
                return
            transfer.peer_knows = True
            message = Failed(expected.transfer_id, transfer.room, reason_text(transfer.reason))
        session = self._table.home(transfer)
        if session is not None:
            self._loop.call(lambda: self.say(session, message))

    def lose(self, session: SendSession, reason: str) -> None:
        """Close a session: its transfers fail, its connections close. Idempotent."""
        why = f"connection to {session} lost: {reason}"
        ended = self._table.lose(session, why)
        if ended is None:
            return
        for transfer in ended.transfers:
            with transfer.lock:
                transfer.fail(why)
                transfer.peer_knows = True
        session.dispatch.close()
        for connection in ended.connections:
            connection.cut()
        self._loop.call(lambda: self._refuse(session, why))
        if not self._table.closing:
            logger.warning("prfaas: session with %s ended: %s", session, reason)
