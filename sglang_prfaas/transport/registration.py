"""A prefill rank's entry in its server's bootstrap directory: made until acknowledged, renewed, and taken back."""

from __future__ import annotations

import logging
import secrets
import threading

import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.addresses import dialable, endpoint
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.messages import (
    Deregister,
    RankInfo,
    Register,
    Registered,
    decode_from_directory,
    encode,
)
from sglang_prfaas.transport.security import PLAIN, Security
from sglang_prfaas.transport.security.curve import Loss
from sglang_prfaas.transport.security.refusals import RefusalLog

logger = logging.getLogger(__name__)

RETRY_S = 0.25
RENEW_S = 10.0


class Registration:
    """Registers `rank` with the directory at `host:port`; the directory may start later than the rank does."""

    def __init__(
        self,
        host: str,
        port: int,
        rank: RankInfo,
        clock: Clock,
        *,
        dp_size: int,
        tp_size: int,
        pp_size: int,
        follow_bootstrap_room: bool,
        page_tokens: int = 0,
        security: Security = PLAIN,
    ) -> None:
        self._rank = rank
        self._clock = clock
        self._boot_id = secrets.token_hex(8)
        self._message = Register(rank, self._boot_id, dp_size, tp_size, pp_size, follow_bootstrap_room, page_tokens)
        self._acknowledged_s = -RENEW_S
        self._gone = threading.Event()
        self._leaving = False
        self._refusals = RefusalLog(logger, clock)
        self._loop = ZmqLoop("prfaas-register", clock, security)
        self._socket = self._loop.socket(zmq.DEALER, host)
        self._loop.add(self._socket, self._receive)
        self._loop.on_loss(self._socket, self._lost)
        self._socket.connect(endpoint(dialable(host), port))
        self._loop.every(RETRY_S, self._tick)

    def start(self) -> None:
        self._loop.start()
        self._loop.call(self._tick)

    def close(self, timeout_s: float = 2.0) -> None:
        """Take the entry back, waiting at most `timeout_s` for the directory's word. Idempotent."""
        if self._leaving:
            return
        self._leaving = True
        self._loop.call(lambda: self._send(Deregister(self._rank, self._boot_id)))
        self._gone.wait(timeout_s)
        self._loop.stop()

    def _tick(self) -> None:
        if not self._leaving and self._clock.now_s() - self._acknowledged_s >= RENEW_S:
            self._send(self._message)

    def _send(self, message: Register | Deregister) -> None:
        try:
            self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            pass  # the directory is not there yet; the next tick tries again

    def _lost(self, loss: Loss) -> None:
        """ZeroMQ dials again by itself."""
        if loss.refused:
            self._refusals.warn(f"this rank cannot register in its bootstrap directory: {loss.reason}")

    def _receive(self, frames: list[zmq.Frame]) -> None:
        try:
            message = decode_from_directory(frames[-1].bytes)
        except ProtocolError as error:
            logger.warning("prfaas: bootstrap directory: %s", error)
            return
        if isinstance(message, Registered):
            self._acknowledged_s = self._clock.now_s()
            if self._leaving:
                self._gone.set()
