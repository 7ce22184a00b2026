"""The prefill site's end of a link that it dials itself: see `gateway`."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping

import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.addresses import endpoint, resolve
from sglang_prfaas.transport.gateway_messages import (
    OFFER_S,
    PREFACE,
    PREFACE_MAGIC,
    VERSION,
    Offer,
    Open,
    Refused,
    decode_from_gateway,
    encode,
)
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.security.curve import Loss
from sglang_prfaas.transport.splice import Splicer

logger = logging.getLogger(__name__)

MAX_DIALLING = 256
DIAL_TIMEOUT_S = 5.0


class DialOut:
    """Keeps a control connection to the gateway of `to_site`, and connects it with `targets`: host by port, and no
    other port of this site. Raises ConfigError for keys that do not fit, LocalError for a host without an address."""

    def __init__(
        self,
        host: str,
        port: int,
        targets: Mapping[int, str],
        *,
        site: str,
        to_site: str,
        config: TransportConfig,
        clock: Clock,
    ) -> None:
        self._host, self._port = resolve(host), port
        self._targets = dict(targets)
        self._to_site = to_site
        self._security = load_security(config)
        self._offer = encode(Offer(VERSION, self._security.site or site))
        self._turn = 0
        self._said = ""
        self._lock = threading.Lock()
        self._dialling: set[threading.Thread] = set()
        self._stopping = False
        self._socket: zmq.Socket[bytes] | None = None
        self._splicer = Splicer("prfaas-dial-out-relay")
        self._loop = ZmqLoop("prfaas-dial-out", clock, self._security)
        self._loop.every(OFFER_S, self._tick)

    def start(self) -> None:
        self._loop.start()
        self._loop.call(self._tick)

    def stop(self) -> None:
        """Close everything. Idempotent."""
        with self._lock:
            self._stopping = True
            dialling = list(self._dialling)
        self._loop.stop()
        for thread in dialling:
            thread.join()
        self._splicer.stop()

    # --- control --------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._socket is None:
            self._dial()
        self._send(self._offer)

    def _dial(self) -> None:
        keys = self._security.site_keys(self._to_site)
        if not keys:
            self._say(f"peers.toml has no site {self._to_site}")
            return
        key = keys[self._turn % len(keys)]
        sock = self._socket = self._loop.socket(zmq.DEALER, self._host, key)
        self._loop.add(sock, self._receive)
        self._loop.on_loss(sock, lambda loss: self._lost(sock, loss), key, found=self._found)
        sock.connect(endpoint(self._host, self._port))

    def _found(self) -> None:
        self._said = ""
        logger.info("prfaas: dialled the gateway of site %s", self._to_site)
        self._send(self._offer)

    def _lost(self, sock: zmq.Socket[bytes], loss: Loss) -> None:
        """ZeroMQ dials again by itself; where the key was refused, the next one is tried."""
        self._say(loss.reason)
        if loss.refused:
            self._turn += 1
            self._socket = None
            self._loop.remove(sock)

    def _say(self, text: str) -> None:
        if text != self._said:
            where = authority(self._host, self._port)
            logger.warning("prfaas: gateway of site %s at %s: %s", self._to_site, where, text)
        self._said = text

    def _send(self, data: bytes) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            pass  # not connected for long: an offer is made again, and the gateway gives up on what it asked for

    def _receive(self, frames: list[zmq.Frame]) -> None:
        try:
            asked = decode_from_gateway(frames[-1].bytes)
        except ProtocolError as error:
            self._say(str(error))
            return
        thread = threading.Thread(target=self._join, args=(asked,), name="prfaas-dial-out-join", daemon=True)
        with self._lock:
            if self._stopping:
                return
            full = len(self._dialling) >= MAX_DIALLING
            if not full:
                self._dialling.add(thread)
                thread.start()
        if full:
            self._refuse(asked, f"{MAX_DIALLING} connections are being made already")

    # --- a short-lived thread for each connection -----------------------------------------------------------------

    def _join(self, asked: Open) -> None:
        try:
            host = self._targets.get(asked.port)
            if host is None:
                self._refuse(asked, f"port {asked.port} is not offered")
                return
            try:
                near = socket.create_connection((host, asked.port), DIAL_TIMEOUT_S)
            except OSError as error:
                closed = isinstance(error, ConnectionRefusedError)
                self._refuse(asked, f"port {asked.port}: {error.strerror or error}", closed=closed)
                return
            try:
                far = socket.create_connection((self._host, self._port + 1), DIAL_TIMEOUT_S)
            except OSError as error:
                near.close()
                self._refuse(asked, f"the port after the gateway's: {error.strerror or error}")
                return
            try:
                far.sendall(PREFACE.pack(PREFACE_MAGIC, asked.token))
            except OSError:
                near.close()
                far.close()
                return  # the gateway gives up by itself
            self._splicer.add(near, far)
        finally:
            with self._lock:
                self._dialling.discard(threading.current_thread())

    def _refuse(self, asked: Open, reason: str, *, closed: bool = False) -> None:
        data = encode(Refused(asked.token, reason[:256], closed))
        self._loop.call(lambda: self._send(data))
