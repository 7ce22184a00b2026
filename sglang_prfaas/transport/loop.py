"""One thread that owns ZeroMQ sockets: they are not thread-safe, so everything that touches one runs in here."""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq

from sglang_prfaas.clock import Clock

logger = logging.getLogger(__name__)


class ZmqLoop:
    """Polls sockets, runs calls handed over by other threads, and ticks. An error in a callback is logged, no more.

    `stop()` joins the thread and closes what it owns: sockets without lingering, and the context.
    """

    def __init__(self, name: str, clock: Clock) -> None:
        self.context = zmq.Context()
        self._clock = clock
        self._poller = zmq.Poller()
        self._handlers: dict[Any, Callable[[Any], None]] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._ticks: list[list[Any]] = []
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._poller.register(self._wake_read.fileno(), zmq.POLLIN)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def socket(self, kind: int, host: str) -> zmq.Socket[bytes]:
        """A new socket with bounded queues that never lingers; IPv6 where the host is an IPv6 address."""
        sock = self.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.IPV6, int(":" in host))
        sock.setsockopt(zmq.MAXMSGSIZE, 1 << 20)
        sock.setsockopt(zmq.RECONNECT_IVL, 100)
        sock.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        return sock

    def add(self, sock: zmq.Socket[bytes], handler: Callable[[list[zmq.Frame]], None]) -> None:
        """Deliver every multipart message of `sock` to `handler`. Before `start`, or from within the loop."""
        self._handlers[sock] = handler
        self._poller.register(sock, zmq.POLLIN)

    def remove(self, sock: zmq.Socket[bytes]) -> None:
        """Stop polling `sock` and close it, with the linger it was given. From within the loop."""
        if self._handlers.pop(sock, None) is not None:
            self._poller.unregister(sock)
        sock.close()

    def every(self, interval_s: float, tick: Callable[[], None]) -> None:
        """Call `tick` about every `interval_s` seconds. Before `start`."""
        self._ticks.append([interval_s, self._clock.now_s() + interval_s, tick])

    def call(self, function: Callable[[], None]) -> None:
        """Run `function` in the loop, soon. From any thread; after `stop` it is dropped."""
        self._calls.append(function)
        try:
            self._wake_write.send(b"\0")
        except (BlockingIOError, OSError):
            pass  # full: the loop will wake anyway; closed: the loop has ended

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the thread. Idempotent; must not be called from within the loop."""
        self._stopping.set()
        self.call(lambda: None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._step()
            self._run_calls()
        finally:
            for sock in list(self._handlers):
                sock.close(linger=0)
            self._wake_read.close()
            self._wake_write.close()
            self.context.destroy(linger=0)

    def _step(self) -> None:
        now = self._clock.now_s()
        due = min((tick[1] for tick in self._ticks), default=now + 1.0)
        events = dict(self._poller.poll(timeout=int(max(0.0, min(1.0, due - now)) * 1000)))
        if self._wake_read.fileno() in events:
            try:
                while self._wake_read.recv(4096):
                    pass
            except BlockingIOError:
                pass
        for sock, handler in list(self._handlers.items()):
            if sock not in events:
                continue
            while not sock.closed:
                try:
                    frames = sock.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                self._contain(partial(handler, frames))
        self._run_calls()
        now = self._clock.now_s()
        for tick in self._ticks:
            if now >= tick[1]:
                tick[1] = now + tick[0]
                self._contain(tick[2])

    def _run_calls(self) -> None:
        while self._calls:
            self._contain(self._calls.popleft())

    @staticmethod
    def _contain(function: Callable[[], object]) -> None:
        try:
            function()
        except Exception:
            logger.exception("prfaas: error in a control callback; going on")


def endpoint(host: str, port: int) -> str:
    """A ZeroMQ TCP endpoint; IPv6 addresses get their brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def dialable(host: str) -> str:
    """The address to dial for one that was bound: a wildcard becomes the loopback of its family."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1", "*": "127.0.0.1"}.get(host, host)
