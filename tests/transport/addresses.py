"""Two addresses of this machine, and ports there."""

from __future__ import annotations

import contextlib
import socket

HERE, THERE = "127.0.0.1", "127.0.0.5"
"""Where the prefill site's servers listen, and where its gateway in the decode site does."""


def free_pair(host: str) -> int:
    """A port that is free, as is the next one."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind((host, 0))
            port: int = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                other.bind((host, port + 1))
                return port
