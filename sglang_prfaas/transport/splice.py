"""Relays bytes between pairs of TCP connections in the kernel (Linux `splice`): they never enter this process."""

from __future__ import annotations

import fcntl
import logging
import os
import selectors
import socket
import struct
import sys
import threading
from collections import deque

from sglang_prfaas.errors import LocalError

logger = logging.getLogger(__name__)

PIPE_BYTES = 1 << 20
TURNS = 16
"""Fillings of a pipe that one direction gets before the others."""


class _Direction:
    """From one socket to the other, through a pipe of its own."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.read, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            self.size = fcntl.fcntl(self.write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:  # beyond fs.pipe-user-pages-soft
            self.size = fcntl.fcntl(self.write, fcntl.F_GETPIPE_SZ)
        self.held = 0
        self.ended = self.over = False

    def pump(self) -> None:
        """Move what can be moved now. Raises OSError."""
        for _ in range(TURNS):
            took = gave = 0
            if not self.ended and self.held < self.size:
                took = self._take()
            if self.held:
                gave = self._give()
            if self.ended and not self.held and not self.over:
                self.over = True
                self.target.shutdown(socket.SHUT_WR)
            if self.over or not (took or gave) or (self.held and not gave):
                return

    def _take(self) -> int:
        try:
            count = os.splice(self.source.fileno(), self.write, self.size - self.held, flags=_FLAGS)
        except BlockingIOError:
            return 0
        self.ended = count == 0
        self.held += count
        return count

    def _give(self) -> int:
        try:
            count = os.splice(self.read, self.target.fileno(), self.held, flags=_FLAGS)
        except BlockingIOError:
            return 0
        self.held -= count
        return count

    def close(self) -> None:
        os.close(self.read)
        os.close(self.write)


_FLAGS = getattr(os, "SPLICE_F_MOVE", 0) | getattr(os, "SPLICE_F_NONBLOCK", 0)


class _Pair:
    def __init__(self, one: socket.socket, other: socket.socket) -> None:
        self.socks = (one, other)
        self.directions = (_Direction(one, other), _Direction(other, one))

    def events(self, sock: socket.socket) -> int:
        """What a socket has to be watched for."""
        events = 0
        for direction in self.directions:
            if direction.source is sock and not direction.ended and not direction.held:
                events |= selectors.EVENT_READ
            if direction.target is sock and direction.held:
                events |= selectors.EVENT_WRITE
        return events


class Splicer:
    """One thread for all pairs. Raises LocalError where the system has no `splice`."""

    def __init__(self, name: str) -> None:
        if sys.platform != "linux":
            raise LocalError("a gateway needs Linux: it relays with splice")
        self._selector = selectors.DefaultSelector()
        self._pairs: set[_Pair] = set()
        self._watched: dict[socket.socket, int] = {}
        self._new: deque[_Pair] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Pairs that are relayed."""
        return len(self._pairs) + len(self._new)

    def add(self, one: socket.socket, other: socket.socket) -> None:
        """Relay between two connections, which are closed with each other. From any thread."""
        for sock in (one, other):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            if not self._stopping:
                self._new.append(_Pair(one, other))
                self._wake()
                return
        one.close()
        other.close()

    def stop(self) -> None:
        """Close all connections. Idempotent."""
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._wake()
        self._thread.join()

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except BlockingIOError:
            pass  # full of wake-ups already

    def _run(self) -> None:
        while not self._stopping:
            for key, _ in self._selector.select():
                if isinstance(key.data, _Pair):
                    if key.data in self._pairs:
                        self._pump(key.data)
                else:
                    self._wake_read.recv(4096)
            while self._new:
                pair = self._new.popleft()
                self._pairs.add(pair)
                self._pump(pair)
        for pair in [*self._pairs, *self._new]:
            self._end(pair)
        self._selector.close()
        self._wake_read.close()
        self._wake_write.close()

    def _pump(self, pair: _Pair) -> None:
        try:
            for direction in pair.directions:
                direction.pump()
        except OSError as error:
            logger.debug("prfaas: a relayed connection has ended: %s", error)
            self._end(pair, reset=True)
            return
        if all(direction.over for direction in pair.directions):
            self._end(pair)
            return
        for sock in pair.socks:
            self._watch(sock, pair)

    def _watch(self, sock: socket.socket, pair: _Pair) -> None:
        wanted, before = pair.events(sock), self._watched.get(sock, 0)
        if wanted == before:
            return
        if not before:
            self._selector.register(sock, wanted, pair)
        elif wanted:
            self._selector.modify(sock, wanted, pair)
        else:
            self._selector.unregister(sock)
        self._watched[sock] = wanted

    def _end(self, pair: _Pair, *, reset: bool = False) -> None:
        """Close both. reset: one was reset, so the other is."""
        self._pairs.discard(pair)
        for sock in pair.socks:
            if self._watched.pop(sock, 0):
                self._selector.unregister(sock)
            if reset:
                close_with_reset(sock)
            else:
                sock.close()
        for direction in pair.directions:
            direction.close()


def close_with_reset(sock: socket.socket) -> None:
    """Close a connection so that its peer sees a reset."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        pass  # it is not connected any more
    sock.close()
