"""One end of a pair of sockets, as what lanes and vectors send to and receive from."""

from __future__ import annotations

import socket
from collections.abc import Callable


class SocketEnd:
    """Takes and gives a few bytes at a time, and never waits."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def send(self, views: list[memoryview], *, more: bool = False) -> int:
        try:
            return self.sock.sendmsg(views)
        except BlockingIOError:
            return 0

    def send_with(self, act: Callable[[int], int]) -> int:
        return act(self.sock.fileno())

    def receive(self, views: list[memoryview]) -> int | None:
        try:
            return self.sock.recvmsg_into(views)[0]
        except BlockingIOError:
            return None

    def receive_with(self, act: Callable[[int], int | None]) -> int | None:
        return act(self.sock.fileno())
