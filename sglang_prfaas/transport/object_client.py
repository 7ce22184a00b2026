"""Asks another site's prefix cache, and gets objects from it. Connections are kept for the next question."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from sglang_prfaas.clock import Deadline
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.config.security import NO_KEYS, beyond_this_machine
from sglang_prfaas.errors import ConfigError, PeerGoneError, ProtocolError
from sglang_prfaas.transport.addresses import resolve
from sglang_prfaas.transport.data_tcp import Connection, connect, unconnected
from sglang_prfaas.transport.object_messages import (
    HEAD,
    OBJECT_LENGTH,
    Ask,
    Get,
    Groups,
    body_bytes,
    count,
    pack,
    unpack_sizes,
)
from sglang_prfaas.transport.object_streams import receive, send
from sglang_prfaas.transport.security import Security

MAX_IDLE = 8
LEAST_LANE_BYTES = 1 << 20
"""A fetch takes one connection more, up to transport.connections, for each so many bytes."""

_Wanted = tuple[str, str, int]
"""Namespace, key, length of the frame."""


def _pairs(groups: Groups) -> Iterator[tuple[str, str]]:
    return ((namespace, key) for namespace, keys in groups for key in keys)


class ObjectClient:
    """One peer. With keys, it must prove to be `site`. Safe for several threads, each with a connection of its own.

    Raises ConfigError for a peer beyond this machine where there are no keys, unless security is off."""

    def __init__(self, site: str, host: str, port: int, config: TransportConfig, security: Security) -> None:
        if security.keys is None and config.security != "off" and beyond_this_machine(host):
            raise ConfigError(f"prefix_cache.peers.{site}: {host} is an address {NO_KEYS}")
        self.site = site
        self._host, self._port = host, port
        self._config = config
        self._security = security
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._in_use: set[Connection] = set()
        self._closed = False

    def ask(self, groups: Groups, deadline: Deadline) -> Sequence[int]:
        """Lengths of the frames, 0 for what is not there. Raises PeerError, LocalError."""
        with self._connection(deadline) as connection:
            send(connection.sock, memoryview(pack(Ask(groups))), deadline)
            head = bytearray(HEAD.size)
            receive(connection.sock, memoryview(head), deadline)
            body = bytearray(body_bytes(head))
            receive(connection.sock, memoryview(body), deadline)
            return unpack_sizes(head, body, count(groups))

    def get(
        self, groups: Groups, sizes: Sequence[int], take: Callable[[str, bytearray], None], deadline: Deadline
    ) -> bool:
        """Give each frame, of the length in `sizes`, to `take`, over as many connections as it is worth, each with a
        thread that calls it. False: the peer has not all of them any more. Raises PeerError (ProtocolError for another
        length), LocalError, and what `take` raises, when all connections have ended."""
        wanted = [(ns, key, size) for (ns, key), size in zip(_pairs(groups), sizes, strict=True)]
        count = min(self._config.connections, max(1, sum(sizes) // LEAST_LANE_BYTES))
        if count == 1:
            return self._get(wanted, take, deadline)
        with concurrent.futures.ThreadPoolExecutor(count, thread_name_prefix="prfaas-fetch-lane") as pool:
            lanes = [pool.submit(self._get, wanted[number::count], take, deadline) for number in range(count)]
        return all(lane.result() for lane in lanes)

    def _get(self, wanted: Sequence[_Wanted], take: Callable[[str, bytearray], None], deadline: Deadline) -> bool:
        groups = tuple(
            (ns, tuple(key for _, key, _ in items)) for ns, items in itertools.groupby(wanted, lambda item: item[0])
        )
        with self._connection(deadline) as connection:
            send(connection.sock, memoryview(pack(Get(groups))), deadline)
            prefix = bytearray(OBJECT_LENGTH.size)
            for ns, key, size in wanted:
                name = f"{ns}/{key}"
                receive(connection.sock, memoryview(prefix), deadline)
                (length,) = OBJECT_LENGTH.unpack(prefix)
                if not length:
                    return False
                if length != size:
                    raise ProtocolError(f"{name} has {length} bytes, {size} were announced")
                frame = bytearray(length)
                receive(connection.sock, memoryview(frame), deadline)
                take(name, frame)
        return True

    def close(self) -> None:
        """Cut what is under way. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._in_use:
                connection.cut()
        for connection in idle:
            connection.close()

    @contextmanager
    def _connection(self, deadline: Deadline) -> Iterator[Connection]:
        """A connection, kept for others where nothing goes wrong."""
        connection = self._take_idle()
        fresh = connection is None
        if connection is None:
            host = resolve(self._host)
            connection = unconnected(host, self._config)
        whole = False
        try:
            with self._lock:
                if self._closed:
                    raise PeerGoneError("this side is closing")
                self._in_use.add(connection)
            if fresh:
                site = self.site if self._security.keys is not None else ""
                connect(connection, host, self._port, max(1e-3, deadline.remaining_s()), self._security, site)
            yield connection
            whole = True
        finally:
            with self._lock:
                self._in_use.discard(connection)
                keep = whole and not self._closed and len(self._idle) < MAX_IDLE and not connection.used_up
                if keep:
                    self._idle.append(connection)
            if not keep:
                connection.close()

    def _take_idle(self) -> Connection | None:
        """One that the peer has not closed meanwhile: it says nothing unless it is asked."""
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
            if not connection.wait(write=False, timeout_s=0.0):
                return connection
            connection.close()
