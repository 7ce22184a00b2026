"""What a prefill rank does with the control messages of decode ranks."""

from __future__ import annotations

import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import ChecksumError, ProtocolError
from sglang_prfaas.transport.clients import Doomed
from sglang_prfaas.transport.link_monitor import LinkMonitor
from sglang_prfaas.transport.mailbox import unseal
from sglang_prfaas.transport.messages import (
    Abort,
    Bye,
    Done,
    Expect,
    Failed,
    Hello,
    Ping,
    Pong,
    Refuse,
    ToPrefill,
    Unknown,
    decode_to_prefill,
    reason_text,
)
from sglang_prfaas.transport.security.refusals import RefusalLog
from sglang_prfaas.transport.send_control import SendControl
from sglang_prfaas.transport.send_handshake import Handshake
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.send_table import SendTable

MAX_SESSION_TRANSFERS = 4096
"""Requests that one decode rank may have open."""


class SendHandler:
    """Belongs to the control loop: it calls `receive`, `control_lost` and `client_cut`. components: that this rank's
    layout has."""

    def __init__(
        self,
        components: int,
        clock: Clock,
        *,
        table: SendTable,
        control: SendControl,
        handshake: Handshake,
        links: LinkMonitor,
        refusals: RefusalLog,
    ) -> None:
        self._components = components
        self._clock = clock
        self._table = table
        self._control = control
        self._handshake = handshake
        self._links = links
        self._refusals = refusals

    def receive(self, frames: list[zmq.Frame]) -> None:
        """A message has come: the identity of its sender, and an envelope."""
        if len(frames) != 2:
            self._refusals.warn(f"control message of {len(frames)} frames dropped, expected 2")
            return
        identity = frames[0].bytes
        session = self._table.sessions.get(identity)
        now_s = self._clock.now_s()
        try:
            number, acknowledged, body = unseal(frames[1].bytes)
            if session is not None and not session.mailbox.accept(number, acknowledged, now_s):
                return
            message = decode_to_prefill(body)
        except ChecksumError as error:
            self._refusals.warn(f"{session or 'a peer without a session'}: {error}")
            return  # it comes again
        except ProtocolError as error:
            self._refusals.warn(f"{session or 'a peer without a session'}: {error}")
            self._control.reply(identity, Refuse(reason_text(str(error))))
            if session is not None:
                self._control.lose(session, str(error))
            return
        if session is not None:
            session.health.heard(now_s)
        if isinstance(message, Hello):
            self._handshake.hello(identity, message, frames[1])
        else:
            self._act(identity, session, message)
        session = self._table.sessions.get(identity)
        if session is not None:
            self._came_over(session, int(frames[1].get(zmq.SRCFD)), now_s)

    def control_lost(self, descriptor: int) -> None:
        """A control connection has ended. Its decode rank may dial again."""
        with self._table.lock:
            for session in self._table.sessions.values():
                if session.descriptor == descriptor:
                    session.health.control_lost(self._clock.now_s())

    def client_cut(self, doomed: Doomed) -> bool:
        """A decode rank's control connection is about to be cut: its session ends with it. Returns whether there was
        one."""
        session = self._table.sessions.get(doomed.identity)
        if session is not None:
            self._control.lose(session, doomed.reason)
        return session is not None

    def _came_over(self, session: SendSession, descriptor: int, now_s: float) -> None:
        """A message came over a control connection, which may have ended since."""
        if descriptor == session.descriptor and session.health.control_stands:
            return
        session.descriptor = descriptor
        stands = self._control.stands(descriptor)
        with self._table.lock:
            if stands:
                session.health.control_found(now_s)
            else:
                session.health.control_lost(now_s)

    def _act(self, identity: bytes, session: SendSession | None, message: ToPrefill) -> None:
        if isinstance(message, Abort):
            self._aborted(session, message)
        elif session is None:
            why = self._table.farewell(identity)
            self._control.reply(identity, Refuse(reason_text(why)) if why else Unknown(self._handshake.instance))
        elif isinstance(message, Expect):
            self._expect(session, message)
        elif isinstance(message, Done):
            self._done(session, message)
        elif isinstance(message, Bye):
            self._control.lose(session, f"decode ended it: {message.reason}")
        elif isinstance(message, Ping):
            self._control.reply(identity, Pong())

    def _expect(self, session: SendSession, message: Expect) -> None:
        if message.transfer_id in session.transfers:
            self._control.lose(session, f"it used transfer id {message.transfer_id} twice")
            return
        reason = ""
        if len(message.counts) != self._components:
            reason = f"{len(message.counts)} components expected by decode, prefill has {self._components}"
        elif len(session.transfers) >= MAX_SESSION_TRANSFERS:
            reason = f"decode has {MAX_SESSION_TRANSFERS} requests open, no more are allowed"
        elif self._table.closing:
            reason = "the prefill server is stopping"
        else:
            transfer = self._table.asked_for(message.room, session, message.transfer_id)
            if transfer is None:
                return
            with transfer.lock:
                if transfer.expect(message):
                    link = self._links.admission(session.hello.site)
                    transfer.goes_over(link, session.view.layout.request_bytes(message.counts))
                    transfer.codec = session.codec.name
                else:
                    reason = transfer.reason
        if reason:
            self._control.say(session, Failed(message.transfer_id, message.room, reason_text(reason)))

    def _done(self, session: SendSession, message: Done) -> None:
        transfer = session.transfers.get(message.transfer_id)
        if transfer is None or transfer.room != message.room:
            return  # it was released here, which tells decode
        with transfer.lock:
            transfer.done()
        self._control.report(transfer)

    def _aborted(self, session: SendSession | None, message: Abort) -> None:
        reason = f"decode ended the request: {message.reason}"
        transfer = self._table.aborted(message.room, session, message.transfer_id, reason)
        if transfer is not None:
            with transfer.lock:
                transfer.fail(reason)
                transfer.peer_knows = True
