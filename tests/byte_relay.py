"""A TCP relay that lets tests see, hold back and cut what passes."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self

_READ_BYTES = 4096


class ByteRelay:
    """Passes bytes on between whoever dials it and `port` of this machine, a thread for each direction of a connection.

    Use in a `with`.
    """

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, name="relay-accept", daemon=True)]

    def passing(self, data: bytes, *, from_far: bool) -> bool:
        """Called before bytes are passed on; from_far: from `port`. False cuts the connection instead."""
        return True

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in [self._listener, *self._socks]:
            _end(sock)
        for thread in self._threads:
            thread.join()
        for sock in [self._listener, *self._socks]:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._socks += [near, far]
            for source, target in ((near, far), (far, near)):
                thread = threading.Thread(
                    target=self._copy, args=(source, target, source is far), name="relay-copy", daemon=True
                )
                self._threads.append(thread)
                thread.start()

    def _copy(self, source: socket.socket, target: socket.socket, from_far: bool) -> None:
        try:
            while data := source.recv(_READ_BYTES):
                if not self.passing(data, from_far=from_far):
                    break
                target.sendall(data)
            else:
                target.shutdown(socket.SHUT_WR)
                return
        except OSError:
            pass  # one side has gone
        _end(source)
        _end(target)


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it has ended already
        sock.shutdown(socket.SHUT_RDWR)
