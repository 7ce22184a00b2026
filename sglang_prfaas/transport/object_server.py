"""Serves the objects of a prefix cache to other sites: read only, a thread for each connection, all of it bounded."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Collection
from typing import Protocol

from msgspec import Struct

from sglang_prfaas.clock import Clock, Deadline, MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import DeadlineError, LocalError, PeerError, PrfaasError
from sglang_prfaas.transport.addresses import resolve
from sglang_prfaas.transport.data_tcp import Connection, tune
from sglang_prfaas.transport.object_messages import (
    HEAD,
    OBJECT_LENGTH,
    Ask,
    Get,
    Groups,
    Sizes,
    body_bytes,
    names_of,
    pack,
    unpack_request,
)
from sglang_prfaas.transport.object_streams import receive, send
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.security.refusals import RefusalLog
from sglang_prfaas.transport.security.tls import explain

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 256
MAX_PENDING = 64
"""Of them, those that have yet to prove their site; one more, and the oldest is cut."""
HANDSHAKE_TIMEOUT_S = 10.0
IDLE_TIMEOUT_S = 120.0
REQUEST_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 300.0
WATCH_S = 0.5
"""Between two looks at the list of sites."""
ACCEPT_PAUSE_S = 1.0
"""Rest after an accept that failed, for want of descriptors."""


class ObjectSource(Protocol):
    """Where served objects come from. Safe for several threads; a fault is a miss."""

    def frame_bytes(self, name: str) -> int:
        """Length of the object's frame, 0 where there is none."""

    def read_frame(self, name: str) -> bytes | None:
        """The frame, whole and unchanged."""


class ServedStats(Struct, kw_only=True):
    """Since the start."""

    questions: int = 0
    objects: int = 0
    bytes: int = 0
    refused: int = 0
    """Connections that were not let in, or sent what is no request."""


class ObjectServer:
    """Listens from the start on. With keys only the own site and `sites` are let in; without, whoever reaches the port.

    Raises LocalError where the port is taken, ConfigError for keys that do not fit, or for an address that others reach
    without keys."""

    def __init__(
        self,
        host: str,
        port: int,
        source: ObjectSource,
        config: TransportConfig,
        sites: Collection[str] = (),
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or MonotonicClock()
        self._source = source
        self._config = config
        self._security = load_security(config)
        self._sites = {self._security.site, *sites}
        self._refusals = RefusalLog(logger, self._clock)
        self._lock = threading.Lock()
        self._stats = ServedStats()
        self._connections: dict[Connection, threading.Thread] = {}
        self._pending: dict[Connection, None] = {}
        self._stopping = threading.Event()
        host = resolve(host)
        self._security.may_listen("the prefix cache", host, config, "can read cached prefixes whose hash it knows")
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
        except (OSError, OverflowError) as error:
            raise LocalError(
                f"prefix_cache.serve_port {port} on {host} cannot be used: {error}; choose another"
            ) from None
        self.port: int = self._listener.getsockname()[1]
        self._listener.settimeout(WATCH_S)
        self._watch = self._security.watch()
        self._watched_s = self._clock.now_s()
        self._thread = threading.Thread(target=self._accept, name="prfaas-cache-accept", daemon=True)
        self._thread.start()

    def stats(self) -> ServedStats:
        with self._lock:
            return ServedStats(
                questions=self._stats.questions,
                objects=self._stats.objects,
                bytes=self._stats.bytes,
                refused=self._stats.refused,
            )

    def close(self) -> None:
        """Cut all connections and wait for their threads. Idempotent."""
        with self._lock:
            self._stopping.set()
            threads = list(self._connections.values())
            for connection in self._connections:
                connection.cut()
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # closed before
        for thread in (self._thread, *threads):
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            self._cut_unlisted()
            try:
                sock, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if not self._stopping.is_set():
                    logger.warning("prfaas: a connection to the prefix cache could not be accepted: %s", error)
                if self._stopping.wait(ACCEPT_PAUSE_S):
                    return
                continue
            connection = Connection(sock)
            thread = threading.Thread(
                target=self._run, args=(connection, address[0]), name="prfaas-cache-serve", daemon=True
            )
            with self._lock:
                full = self._stopping.is_set() or len(self._connections) >= MAX_CONNECTIONS
                if not full:
                    if len(self._pending) >= MAX_PENDING:
                        oldest = next(iter(self._pending))
                        del self._pending[oldest]
                        oldest.cut()
                    self._connections[connection] = thread
                    self._pending[connection] = None
                    thread.start()
            if full:
                connection.close()
                self._refuse(address[0], f"{MAX_CONNECTIONS} connections are open already")

    def _cut_unlisted(self) -> None:
        """End the connections of certificates that are not let in any more."""
        now_s = self._clock.now_s()
        if now_s - self._watched_s < WATCH_S / 2:
            return  # connections come quickly
        self._watched_s = now_s
        if not self._watch.changed():
            return
        with self._lock:
            for connection in self._connections:
                digest = connection.certificate
                if digest and not self._watch.has_certificate(connection.site, digest):
                    connection.cut()
                    self._refusals.warn(
                        f"prefix cache: connection of site {connection.site} ended: its certificate {digest} is not in "
                        "peers.toml any more"
                    )

    def _run(self, connection: Connection, address: str) -> None:
        try:
            self._let_in(connection)
            with self._lock:
                self._pending.pop(connection, None)
            while self._answer(connection):
                pass
        except (PrfaasError, OSError) as error:
            if not connection.was_cut:
                self._refuse(address, explain(error) if isinstance(error, OSError) else str(error))
        finally:
            with self._lock:
                self._pending.pop(connection, None)
                del self._connections[connection]
            connection.close()

    def _let_in(self, connection: Connection) -> None:
        tune(connection.sock, self._config)
        connection.sock.settimeout(HANDSHAKE_TIMEOUT_S)
        connection.sock = self._security.wrap(connection.sock, server_side=True)
        connection.site, connection.certificate = self._security.handshake(connection.sock)
        if self._security.keys is not None and connection.site not in self._sites:
            raise PeerError(f"site {connection.site} is not in prefix_cache.serve_to")

    def _answer(self, connection: Connection) -> bool:
        """One request. False: the peer has closed, or has nothing to ask any more."""
        head, sock = bytearray(HEAD.size), connection.sock
        try:
            if not receive(sock, memoryview(head), Deadline(self._clock, IDLE_TIMEOUT_S), may_end=True):
                return False
        except DeadlineError:
            return False
        body = bytearray(body_bytes(head))
        receive(sock, memoryview(body), Deadline(self._clock, REQUEST_TIMEOUT_S))
        request = unpack_request(head, body)
        deadline = Deadline(self._clock, ANSWER_TIMEOUT_S)
        with self._lock:
            self._stats.questions += isinstance(request, Ask)
        match request:
            case Ask(groups):
                sizes = tuple(self._source.frame_bytes(name) for name in names_of(groups))
                send(sock, memoryview(pack(Sizes(sizes))), deadline)
            case Get(groups):
                self._send_objects(sock, groups, deadline)
        return True

    def _send_objects(self, sock: socket.socket, groups: Groups, deadline: Deadline) -> None:
        for name in names_of(groups):
            frame = self._source.read_frame(name)
            if frame is None:
                send(sock, memoryview(OBJECT_LENGTH.pack(0)), deadline)
                return
            send(sock, memoryview(OBJECT_LENGTH.pack(len(frame))), deadline)
            send(sock, memoryview(frame), deadline)
            with self._lock:
                self._stats.objects += 1
                self._stats.bytes += len(frame)

    def _refuse(self, address: str, reason: str) -> None:
        with self._lock:
            self._stats.refused += 1
        self._refusals.warn(f"prefix cache: connection from {address} ended: {reason}")
