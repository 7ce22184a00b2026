"""Memory sent over TCP without a copy: `vmsplice` puts references to pages into a pipe, `splice` into a socket.

The kernel reads the memory until the peer's TCP has acknowledged it. Linux; see `available`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import itertools
import os
import socket
import struct
import time

PIPE_BYTES = 1 << 20
"""Asked for; the most that /proc/sys/fs/pipe-max-size grants without privileges by default."""
F_SETPIPE_SZ = 1031
SPLICE_F_NONBLOCK = 2
SPLICE_F_MORE = 4
PROBE_TIMEOUT_S = 0.2
PROBE_ROUNDS = 256


_libc = ctypes.CDLL(None, use_errno=True)


class PagePipe:
    """A pipe between a process's memory and one socket. For one thread. Raises OSError where there is none to have."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.total = 0
        """Bytes put in so far."""
        self.held = 0
        """Bytes that were put in and have yet to go to the socket."""
        try:
            fcntl.fcntl(self._write, F_SETPIPE_SZ, PIPE_BYTES)
        except OSError:
            self.close()
            raise

    def put(self, views: list[memoryview]) -> int:
        """Take writable memory, up to the pipe's size; returns how many bytes. Raises OSError for memory whose pages
        cannot be referenced, TypeError for memory that cannot be written to."""
        count = len(views)
        starts = list(map(ctypes.c_char.from_buffer, views))
        extents = zip(map(ctypes.addressof, starts), map(len, views), strict=True)
        vectors = struct.pack(f"@{2 * count}N", *itertools.chain.from_iterable(extents))
        taken: int = _libc.vmsplice(self._write, vectors, ctypes.c_size_t(count), SPLICE_F_NONBLOCK)
        if taken < 0:
            code = ctypes.get_errno()
            if code == errno.EAGAIN:
                return 0
            raise OSError(code, os.strerror(code))
        self.held += taken
        self.total += taken
        return taken

    def pour(self, sock: socket.socket) -> bool:
        """Hand what is held to a socket that does not block; returns whether all of it went. Raises OSError."""
        while self.held:
            try:
                count = os.splice(self._read, sock.fileno(), self.held, flags=SPLICE_F_NONBLOCK)
            except BlockingIOError:
                return False
            self.held -= count
        return True

    def close(self) -> None:
        """Idempotent."""
        for descriptor in (self._read, self._write):
            if descriptor >= 0:
                os.close(descriptor)
        self._read = self._write = -1


@functools.cache
def available() -> bool:
    """Whether memory can be sent like this here: tried once, between two sockets of this process. False too for
    kernels on which `splice` waits for a socket that does not block (Linux 6.5 to 6.7)."""
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as near,
            listener.accept()[0] as far,
        ):
            return _passes(near, far)
    except (OSError, AttributeError):
        return False


def _passes(near: socket.socket, far: socket.socket) -> bool:
    """Fill `near` until it would have to wait, and see that `far` gets the same."""
    near.setblocking(False)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 0, int(PROBE_TIMEOUT_S * 1e6)))
    far.settimeout(PROBE_TIMEOUT_S)
    data = bytearray(os.urandom(PIPE_BYTES))
    pipe = PagePipe()
    began_s = time.monotonic()
    try:
        for _ in range(PROBE_ROUNDS):
            pipe.put([memoryview(data)[pipe.total % PIPE_BYTES :]])
            if not pipe.pour(near):
                break
        if time.monotonic() - began_s >= PROBE_TIMEOUT_S:
            return False
        sent = pipe.total - pipe.held
        got = bytearray()
        while len(got) < sent:
            got += far.recv(PIPE_BYTES)
        return got == (data * (sent // PIPE_BYTES + 1))[:sent]
    finally:
        pipe.close()
