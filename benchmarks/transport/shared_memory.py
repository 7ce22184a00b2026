"""Memory that the processes of a run share: all senders have one, all receivers the other."""

from __future__ import annotations

import mmap
import os

import numpy as np

from benchmarks.transport.workload import Bytes


class SharedMemory:
    """`nbytes` that other processes of this user may `attach` by `path` while this object lives."""

    def __init__(self, name: str, nbytes: int) -> None:
        self._descriptor = os.memfd_create(name)
        os.ftruncate(self._descriptor, nbytes)
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        self.flat = _mapped(self._descriptor, nbytes)

    def close(self) -> None:
        """Let go of it; what is mapped stays until its process lets go, too."""
        os.close(self._descriptor)


def attach(path: str, nbytes: int) -> Bytes:
    """The first bytes of a SharedMemory, with every page in place."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        return _mapped(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, nbytes: int) -> Bytes:
    mapped = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return np.frombuffer(mapped, np.uint8)
