"""What a decode rank does with the control messages of prefill ranks."""

from __future__ import annotations

import logging

import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ChecksumError, ProtocolError
from sglang_prfaas.transport.codec.session import RAW, SessionCodec, obstacle
from sglang_prfaas.transport.link_tuning import LinkTuning
from sglang_prfaas.transport.mailbox import unseal
from sglang_prfaas.transport.messages import (
    Failed,
    Redial,
    Refuse,
    Unknown,
    Welcome,
    decode_to_decode,
)
from sglang_prfaas.transport.receive_control import ReceiveControl
from sglang_prfaas.transport.receive_data import DataReceiver
from sglang_prfaas.transport.receive_session import PeerSession

logger = logging.getLogger(__name__)


class ReceiveHandler:
    """Belongs to the control loop."""

    def __init__(
        self, config: TransportConfig, clock: Clock, *, control: ReceiveControl, data: DataReceiver, tuning: LinkTuning
    ) -> None:
        self._config = config
        self._clock = clock
        self._control = control
        self._data = data
        self._tuning = tuning

    def receive(self, session: PeerSession, host: str, frames: list[zmq.Frame]) -> None:
        """A message has come from the prefill rank at `host`."""
        now_s = self._clock.now_s()
        session.health.heard(now_s)
        try:
            number, acknowledged, body = unseal(frames[-1].bytes)
            if not session.mailbox.accept(number, acknowledged, now_s):
                return
            message = decode_to_decode(body)
        except ChecksumError as error:
            logger.warning("prfaas: %s: %s", session, error)
            return  # it comes again
        except ProtocolError as error:
            self._control.lose(session, str(error))
            return
        if isinstance(message, Welcome):
            self._welcomed(session, host, message)
        elif isinstance(message, Refuse):
            self._control.lose(session, message.reason)
        elif isinstance(message, Failed):
            item = session.incoming.get(message.transfer_id)
            if item is not None:
                with item.transfer.lock:
                    item.transfer.fail(f"prefill gave the request up: {message.reason}")
                    item.transfer.peer_knows = True
        elif isinstance(message, Redial):
            with session.lock:
                connection = session.connections.get(message.index)
            if connection is not None:
                connection.cut()
        elif isinstance(message, Unknown) and session.instance:
            restarted = message.instance != session.instance
            self._control.lose(session, "its process has restarted" if restarted else "it has given this session up")

    def _welcomed(self, session: PeerSession, host: str, welcome: Welcome) -> None:
        """The prefill rank has let us in: once, or again where it did not hear that we know."""
        if session.instance:
            if welcome.instance != session.instance:
                self._control.lose(session, "its process has restarted")
            return
        assert session.hello is not None
        layout = session.view.layout
        why = obstacle(welcome.codec, layout, session.hello.codecs, self._config.chunk_bytes)
        if welcome.codec != RAW and why:
            self._control.lose(session, f"it would encode KVCache as {welcome.codec}: {why}")
            return
        session.codec = SessionCodec(welcome.codec, layout)
        session.instance = welcome.instance
        connections = welcome.connections or session.hello.connections
        session.config = self._tuning.for_agreed(session.server.site or welcome.site, connections)
        with session.lock:
            session.health.expects(connections)
        self._data.dial(session, host, welcome)
