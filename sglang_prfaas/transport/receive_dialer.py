"""The control connection of a session: a decode rank dials it, and notes when it is lost and found."""

from __future__ import annotations

import logging
import math
import socket
import threading

import msgspec
import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.addresses import endpoint
from sglang_prfaas.transport.health import REFUSALS
from sglang_prfaas.transport.link_tuning import LinkTuning
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.mailbox import ENVELOPE
from sglang_prfaas.transport.messages import MAX_REQUEST_BYTES, Hello, encode
from sglang_prfaas.transport.receive_control import ReceiveControl
from sglang_prfaas.transport.receive_handler import ReceiveHandler
from sglang_prfaas.transport.receive_session import PeerSession
from sglang_prfaas.transport.security import ServerKeys
from sglang_prfaas.transport.security.curve import Loss

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 3.0
PROBE_PAUSE_S = 0.2


class ControlDialer:
    """Belongs to the control loop, but for a short-lived thread that looks whether a prefill process is gone. hello: as
    this rank is to every prefill rank; what depends on the session is filled in."""

    def __init__(
        self,
        hello: Hello,
        config: TransportConfig,
        clock: Clock,
        loop: ZmqLoop,
        *,
        control: ReceiveControl,
        handler: ReceiveHandler,
        tuning: LinkTuning,
        keys: ServerKeys,
    ) -> None:
        self._hello = hello
        self._config = config
        self._clock = clock
        self._loop = loop
        self._control = control
        self._handler = handler
        self._tuning = tuning
        self._keys = keys

    def open(self, session: PeerSession, host: str) -> None:
        """Dial a prefill rank, whose host's address is `host`, and say hello."""
        if session.failure:
            return
        try:
            session.server = self._keys.get(session.address)
        except LocalError as error:
            self._control.lose(session, str(error))
            return
        sock = self._loop.socket(zmq.DEALER, host, session.server)
        sock.setsockopt(zmq.ROUTING_ID, session.identity)
        # ZeroMQ's own heartbeats make it dial again over a link that was cut in silence: TCP would wait ever longer.
        sock.setsockopt(zmq.HEARTBEAT_IVL, math.ceil(self._config.heartbeat_interval_s * 1000))
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, math.ceil(self._config.heartbeat_timeout_s * 1000))
        session.control = sock
        self._loop.add(sock, lambda frames: self._handler.receive(session, host, frames))
        self._loop.on_loss(
            sock,
            lambda loss: self._lost(session, host, loss),
            session.server,
            found=lambda: self._found(session),
        )
        try:
            sock.connect(endpoint(host, session.control_port))
        except zmq.ZMQError as error:
            self._control.lose(session, f"its control port cannot be dialled: {error}")
            return
        hello = session.hello = msgspec.structs.replace(
            self._hello,
            connections=self._tuning.for_site(session.server.site).connections,
            page_tokens=session.view.peer_page_tokens,
        )
        if len(encode(hello)) + ENVELOPE.size > MAX_REQUEST_BYTES:
            self._control.lose(
                session, f"the layout of this rank takes more than the {MAX_REQUEST_BYTES} bytes of a message"
            )
            return
        self._control.mention(session, hello)
        for message in session.unsent:
            self._control.say(session, message)
        session.unsent.clear()

    def _lost(self, session: PeerSession, host: str, loss: Loss) -> None:
        """ZeroMQ dials again by itself; what was said meanwhile is said again then."""
        if session.failure:
            return
        if loss.refused:
            self._keys.refused(session.address, session.server)
        if (loss.refused and loss.certain) or not session.up:
            self._control.lose(session, loss.reason)
            return
        if not session.connected:
            return  # an attempt to dial again has failed; there will be others
        session.connected = False
        with session.lock:
            session.health.control_lost(self._clock.now_s())
        logger.info("prfaas: control connection of %s lost: %s; dialled again", session, loss.reason)
        threading.Thread(target=self._probe, args=(session, host), name="prfaas-probe", daemon=True).start()

    def _probe(self, session: PeerSession, host: str) -> None:
        """Find out whether the process is gone: then its control port refuses. In a short-lived thread."""
        for _ in range(REFUSALS):
            try:
                socket.create_connection((host, session.control_port), PROBE_TIMEOUT_S).close()
                return
            except ConnectionRefusedError:
                with session.lock:
                    session.health.refused(-1)
            except OSError:
                return  # it says nothing of the process
            if session.ended.wait(PROBE_PAUSE_S):
                return
        self._control.judge(session)

    def _found(self, session: PeerSession) -> None:
        session.connected = True
        now_s = self._clock.now_s()
        with session.lock:
            session.health.control_found(now_s)
        if not session.was_connected:
            session.was_connected = True
            return  # whatever was said so far is on its way
        if not session.instance and session.hello is not None:
            self._control.mention(session, session.hello)
        self._control.say_again(session, now_s, at_once=True)
