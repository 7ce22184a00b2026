"""The decode site's end of a link that the prefill site dials: ports here that lead to that site's servers.

Nobody can dial into a site behind NAT, so that site keeps a control connection to this gateway (`dial_out`). Whoever
connects to one of the gateway's ports is joined with a connection that the site then dials for it. Bytes are relayed as
they are: CURVE and TLS run between the ranks themselves, and the gateway cannot read or forge them.
"""

from __future__ import annotations

import logging
import secrets
import selectors
import socket
import threading
from collections.abc import Sequence

import zmq
from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError, ProtocolError
from sglang_prfaas.transport.addresses import endpoint, resolve
from sglang_prfaas.transport.clients import Doomed, source_of
from sglang_prfaas.transport.gateway_messages import (
    OFFER_S,
    PREFACE,
    PREFACE_MAGIC,
    VERSION,
    Open,
    Refused,
    decode_to_gateway,
    encode,
)
from sglang_prfaas.transport.gateway_ports import GatewayPorts
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.security.refusals import RefusalLog
from sglang_prfaas.transport.splice import Splicer, close_with_reset

logger = logging.getLogger(__name__)

MAX_WAITING = 1024
"""Connections that wait for the site's, and those of the site whose preface has not come."""
MAX_RELAYED = 8192
JOIN_TIMEOUT_S = 10.0
SILENT_S = 4 * OFFER_S
"""After which a site that says nothing cannot be reached."""


class _Waiting(Struct):
    sock: socket.socket
    since_s: float


class _Arriving:
    def __init__(self, sock: socket.socket, source: str, since_s: float) -> None:
        self.sock, self.source, self.since_s = sock, source, since_s
        self.data = b""


class Gateway:
    """Listens for `site` on `port` (control) and the port after it, and for everyone else on `ports`, all of `host`.

    Raises LocalError where a port is taken, ConfigError where others could reach it without keys."""

    def __init__(
        self, host: str, port: int, ports: Sequence[int], site: str, config: TransportConfig, clock: Clock
    ) -> None:
        self.site = site
        self._clock = clock
        self._security = load_security(config)
        self._refusals = RefusalLog(logger, clock)
        self._offers: dict[bytes, float] = {}
        """By routing id, when it was heard last. Belongs to the control loop."""
        self._lock = threading.Lock()
        self._waiting: dict[bytes, _Waiting] = {}
        self._arriving: dict[socket.socket, _Arriving] = {}
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self._stopping = threading.Event()
        address = resolve(host)
        self._security.may_listen("the gateway", address, config, "can pass itself off as the other site")
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._ports = GatewayPorts(address, self._selector, clock)
        self._loop = ZmqLoop("prfaas-gateway", clock, self._security, config.control_messages_per_s)
        try:
            self._control = self._loop.socket(zmq.ROUTER, address)
            self._control.bind(endpoint(address, port))
            self.port = int(self._control.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
            self._ports.listen(self.port + 1, self._accept_site)
            for one in ports:
                self._ports.listen(one, self._accept_client)
            self._splicer = Splicer("prfaas-gateway-relay")
        except (OSError, OverflowError, zmq.ZMQError) as error:
            self._close()
            wanted = ", ".join(map(str, (port, port + 1, *ports)))
            raise LocalError(f"the gateway cannot have ports {wanted} on {host}: {error}") from None
        self._loop.add(self._control, self._receive)
        self._loop.on_cut(self._control, self._cut)
        self._thread = threading.Thread(target=self._run, name="prfaas-gateway-accept", daemon=True)

    def start(self) -> None:
        self._loop.start()
        self._thread.start()

    @property
    def reachable(self) -> bool:
        """Whether the site has said lately that it can be reached."""
        return self._offer() is not None

    def stop(self) -> None:
        """Close everything. Idempotent."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._splicer.stop()
        self._close()

    def _close(self) -> None:
        self._loop.stop()
        for waiting in self._waiting.values():
            waiting.sock.close()
        self._ports.close()
        for sock in (*self._arriving, self._wake_read, self._wake_write):
            sock.close()
        self._selector.close()

    # --- in the thread that accepts -------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(timeout=0.25):
                ready = key.fileobj
                assert isinstance(ready, socket.socket)
                if isinstance(key.data, _Arriving):
                    if ready in self._arriving:  # else it was dropped to make room, in this very turn
                        self._preface(key.data)
                    continue
                if ready is self._wake_read:
                    ready.recv(4096)
                    continue
                try:
                    sock, address = ready.accept()
                except OSError as error:
                    logger.warning("prfaas: gateway: a connection could not be accepted: %s", error)
                    self._stopping.wait(0.05)
                    continue
                key.data(sock, address[0])
            self._ports.refuse_or_listen()
            self._expire()

    def _accept_client(self, sock: socket.socket, host: str) -> None:
        """Somebody of this site wants to reach a port of the other one."""
        port = sock.getsockname()[1]
        offer = self._offer()
        with self._lock:
            full = len(self._waiting) >= MAX_WAITING or len(self._splicer) >= MAX_RELAYED
        if offer is None or full:
            why = "too many connections" if offer is not None else f"site {self.site} has not dialled in"
            self._refusals.warn(f"gateway: connection from {host} to port {port} refused: {why}")
            close_with_reset(sock)
            return
        token = secrets.token_bytes(16)
        with self._lock:
            self._waiting[token] = _Waiting(sock, self._clock.now_s())
        message = encode(Open(token, port))
        self._loop.call(lambda: self._control.send_multipart([offer, message], zmq.NOBLOCK))

    def _accept_site(self, sock: socket.socket, host: str) -> None:
        """A connection that the other site has dialled; its token tells for whom."""
        source = source_of(host)
        if len(self._arriving) >= MAX_WAITING:
            oldest = next(iter(self._arriving.values()))
            self._refusals.warn(f"gateway: connection from {oldest.source} refused: no preface, and too many wait")
            self._drop(oldest)
        sock.setblocking(False)
        arriving = self._arriving[sock] = _Arriving(sock, source, self._clock.now_s())
        self._selector.register(sock, selectors.EVENT_READ, arriving)

    def _preface(self, arriving: _Arriving) -> None:
        try:
            data = arriving.sock.recv(PREFACE.size - len(arriving.data))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        arriving.data += data
        if data and len(arriving.data) < PREFACE.size:
            return
        magic, token = PREFACE.unpack(arriving.data) if len(arriving.data) == PREFACE.size else (b"", b"")
        with self._lock:
            waiting = self._waiting.pop(token, None) if magic == PREFACE_MAGIC else None
        if waiting is None:
            self._refusals.warn(f"gateway: connection from {arriving.source} refused: nobody waits for it")
            self._drop(arriving)
            return
        self._selector.unregister(arriving.sock)
        del self._arriving[arriving.sock]
        self._splicer.add(waiting.sock, arriving.sock)

    def _drop(self, arriving: _Arriving) -> None:
        del self._arriving[arriving.sock]
        self._selector.unregister(arriving.sock)
        arriving.sock.close()

    def _expire(self) -> None:
        before_s = self._clock.now_s() - JOIN_TIMEOUT_S
        for arriving in [one for one in self._arriving.values() if one.since_s < before_s]:
            self._drop(arriving)
        with self._lock:
            late = [token for token, one in self._waiting.items() if one.since_s < before_s]
        for token in late:
            self._give_up(token, f"site {self.site} has not dialled back within {JOIN_TIMEOUT_S:g} s")

    def _give_up(self, token: bytes, reason: str, *, closed: bool = False) -> None:
        with self._lock:
            waiting = self._waiting.pop(token, None)
        if waiting is not None:
            if closed:
                self._ports.refuse(waiting.sock.getsockname()[1])
                self._wake()
            self._refusals.warn(f"gateway: {reason}")
            close_with_reset(waiting.sock)

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except BlockingIOError:
            pass  # full of wake-ups already

    # --- control --------------------------------------------------------------------------------------------------

    def _offer(self) -> bytes | None:
        """Who can be asked: whoever was heard last."""
        before_s = self._clock.now_s() - SILENT_S
        with self._lock:
            found = max(self._offers.items(), key=lambda item: item[1], default=None)
        return found[0] if found is not None and found[1] >= before_s else None

    def _cut(self, doomed: Doomed) -> bool:
        """The other site's control connection is about to be cut."""
        with self._lock:
            known = self._offers.pop(doomed.identity, None) is not None
        if known:
            logger.warning("prfaas: gateway: site %s is cut off: %s", self.site, doomed.reason)
        return known

    def _receive(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            return
        identity = frames[0].bytes
        site = str(frames[1].get("User-Id")) if self._security.keys is not None else ""
        try:
            message = decode_to_gateway(frames[1].bytes)
        except ProtocolError as error:
            self._refusals.warn(f"gateway: {error}")
            return
        if isinstance(message, Refused):
            self._give_up(message.token, f"site {self.site}: {message.reason}", closed=message.closed)
            return
        if message.version != VERSION or (site or message.site) != self.site:
            self._refusals.warn(
                f"gateway: version {message.version} of site {site or message.site} refused, expected version "
                f"{VERSION} of {self.site}"
            )
            return
        now_s = self._clock.now_s()
        with self._lock:
            if identity not in self._offers:
                logger.info("prfaas: gateway: site %s has dialled in", self.site)
            self._offers = {one: at_s for one, at_s in self._offers.items() if now_s - at_s < SILENT_S}
            self._offers[identity] = now_s
