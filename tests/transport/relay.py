"""A TCP relay that does to connections what networks do: resets, cuts, stalls, flipped bytes, refusals. Seeded."""

from __future__ import annotations

import random
import selectors
import socket
import struct
import threading
import time


class _Pipe:
    """One relayed connection."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.stalled_until_s = 0.0

    def other(self, sock: socket.socket) -> socket.socket:
        return self.far if sock is self.near else self.near


class FaultyRelay:
    """Relays `port` of this machine; `target` may change. Faults happen on call, or at random in `corrupt_rate`."""

    def __init__(self, target: int, seed: int) -> None:
        self.target = target
        self.corrupt_rate = 0.0
        """Chance that a read of data towards the side that dialled gets a flipped bit."""
        self.corrupted = 0
        self._rng = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._pipes: list[_Pipe] = []
        self._lock = threading.Lock()
        self._cut_until_s = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        self._thread.join(30.0)
        for pipe in list(self._pipes):
            self._drop(pipe, reset=False)
        self._selector.close()
        self._listener.close()

    def reset_one(self) -> None:
        """A connection is reset both ways."""
        with self._lock:
            if self._pipes:
                self._drop(self._rng.choice(self._pipes), reset=True)

    def cut(self, seconds: float) -> None:
        """All connections are reset, and for a while new ones are closed as soon as they come."""
        with self._lock:
            self._cut_until_s = time.monotonic() + seconds
            for pipe in list(self._pipes):
                self._drop(pipe, reset=True)

    def stall_one(self, seconds: float) -> None:
        """A connection carries nothing for a while."""
        with self._lock:
            if self._pipes:
                self._rng.choice(self._pipes).stalled_until_s = time.monotonic() + seconds

    def _drop(self, pipe: _Pipe, *, reset: bool) -> None:
        self._pipes.remove(pipe)
        for sock in (pipe.near, pipe.far):
            try:
                self._selector.unregister(sock)
            except KeyError:
                pass  # it was stalled
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    def _run(self) -> None:
        while not self._stopping.is_set():
            events = self._selector.select(0.02)
            with self._lock:
                for key, _ in events:
                    if key.fileobj is self._listener:
                        self._accept()
                    elif isinstance(key.data, _Pipe) and key.data in self._pipes:
                        assert isinstance(key.fileobj, socket.socket)
                        self._forward(key.data, key.fileobj)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        if time.monotonic() < self._cut_until_s:
            near.close()
            return
        far = socket.socket()
        try:
            far.connect(("127.0.0.1", self.target))
        except OSError:
            near.close()
            far.close()
            return
        pipe = _Pipe(near, far)
        self._pipes.append(pipe)
        for sock in (near, far):
            sock.settimeout(10.0)
            self._selector.register(sock, selectors.EVENT_READ, pipe)

    def _forward(self, pipe: _Pipe, sock: socket.socket) -> None:
        if time.monotonic() < pipe.stalled_until_s:
            self._stopping.wait(0.001)
            return
        try:
            data = sock.recv(1 << 16)
            if not data:
                self._drop(pipe, reset=False)
                return
            if sock is pipe.far and self._rng.random() < self.corrupt_rate:
                at = self._rng.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ (1 << self._rng.randrange(8))]) + data[at + 1 :]
                self.corrupted += 1
            pipe.other(sock).sendall(data)
        except OSError:
            self._drop(pipe, reset=True)
