"""Plain Python sockets: items one by one with sendall, received in place with recv_into; one thread a connection."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from benchmarks.transport.movers.base import Job, Mover, Offer
from benchmarks.transport.workload import RECEIVE_SEED, SEND_SEED, Memory
from sglang_prfaas.transport import data_tcp

CONNECT_TIMEOUT_S = 30.0


class Sender:
    layerwise = False

    def __init__(self, job: Job, memory: Memory) -> None:
        self._job = job
        self._listener = socket.create_server((job.place.send_host, 0))
        self.offer: Offer = {"port": self._listener.getsockname()[1]}
        self._items = list(memory.items(SEND_SEED))
        self._socks: list[socket.socket] = []

    def connect(self, offer: Offer) -> Offer:
        self._socks = [_tuned(self._listener.accept()[0]) for _ in range(self._job.arm.connections)]
        self._socks.sort(key=lambda sock: sock.recv(1))
        return {"congestion": congestion_of(self._socks[0])}

    def send(self, round_: int) -> tuple[float, float]:
        first = self._socks[0]
        first.recv(1)
        began_s = time.monotonic()
        if self._job.workload.one_by_one:
            for item in self._items:
                first.sendall(item)
                first.recv(1)
        else:
            _in_threads(_send, self._socks, self._items)
        return began_s, time.monotonic()

    def close(self) -> None:
        for sock in [self._listener, *self._socks]:
            sock.close()


class Receiver:
    def __init__(self, job: Job, memory: Memory, offer: Offer) -> None:
        self._job = job
        self.offer: Offer = {}
        self._items = list(memory.items(RECEIVE_SEED))
        self._socks = []
        for index in range(job.arm.connections):
            sock = socket.create_connection((job.place.send_host, offer["port"]), CONNECT_TIMEOUT_S)
            sock.settimeout(None)
            _tuned(sock).sendall(bytes([index]))
            self._socks.append(sock)

    def receive(self, round_: int) -> float:
        first = self._socks[0]
        first.sendall(b"g")
        if self._job.workload.one_by_one:
            for item in self._items:
                _receive(first, [item])
                first.sendall(b"a")
        else:
            _in_threads(_receive, self._socks, self._items)
        return time.monotonic()

    def close(self) -> None:
        for sock in self._socks:
            sock.close()


def congestion_of(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def _tuned(sock: socket.socket) -> socket.socket:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def _in_threads(
    work: Callable[[socket.socket, list[memoryview]], None], socks: list[socket.socket], items: list[memoryview]
) -> None:
    """Bytes dealt out evenly to the connections: items in turn, or slices where there are fewer."""
    if len(items) <= 2 * len(socks):
        items = [piece for item in items for piece in _slices(item, len(socks))]
    threads = [
        threading.Thread(target=work, args=(sock, items[index :: len(socks)])) for index, sock in enumerate(socks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _slices(item: memoryview, count: int) -> list[memoryview]:
    step = -(-len(item) // count)
    return [item[first : first + step] for first in range(0, len(item), step)]


def _send(sock: socket.socket, items: list[memoryview]) -> None:
    for item in items:
        sock.sendall(item)


def _receive(sock: socket.socket, items: list[memoryview]) -> None:
    for item in items:
        if not data_tcp.receive_exactly(sock, item):
            raise ConnectionError("closed")


MOVER = Mover(Sender, Receiver)
