"""Objects as files of a directory that the servers of one host share.

A file is written under another name and renamed, so nobody sees half of it; its checksum shows what a crash of the
machine left torn, and it is deleted then. Nothing is flushed to the disk on purpose: a lost object is computed again.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from pathlib import Path

import xxhash

from sglang_prfaas.clock import Clock, MonotonicClock
from sglang_prfaas.store.objects import frame_head, head_bytes, is_intact
from sglang_prfaas.store.stats import Counters
from sglang_prfaas.store.usage import DirectoryUsage

logger = logging.getLogger(__name__)

_SAY_AGAIN_S = 60.0


class DiskStore:
    """An `ObjectStore`. Raises OSError where `directory` cannot be used, at the start only."""

    def __init__(self, directory: Path, limit_bytes: int, counters: Counters, clock: Clock | None = None) -> None:
        self.usage = DirectoryUsage(directory, limit_bytes)
        self._counters = counters
        self._serial = itertools.count()
        self._clock = clock or MonotonicClock()
        self._say_again_s = 0.0
        self._refused_since_said = 0

    def contains(self, name: str) -> bool:
        return self._path(name).exists()

    def read(self, name: str, out: memoryview) -> bool:
        path = self._path(name)
        head = bytearray(head_bytes(name))
        try:
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            length = os.fstat(file).st_size
            whole = length == len(head) + len(out) and _read_into(file, [memoryview(head), out])
            if not whole or not is_intact(name, head, out):
                self._drop(path, length)
                return False
            os.utime(file)
        except OSError:
            return False
        finally:
            os.close(file)
        return True

    def frame_bytes(self, name: str) -> int:
        """Length of the object with its head, 0 where there is none."""
        try:
            return os.stat(self._path(name)).st_size
        except OSError:
            return 0

    def read_frame(self, name: str) -> bytes | None:
        """The object with its head, as it is sent to another site. None: not there, or corrupt (then it is dropped)."""
        size, head = self.frame_bytes(name), head_bytes(name)
        if size < head:
            return None
        payload = memoryview(bytearray(size - head))
        return frame_head(name, payload) + payload if self.read(name, payload) else None

    def write(self, name: str, payload: memoryview) -> bool:
        path = self._path(name)
        try:
            os.utime(path)
            return True
        except OSError:
            pass
        head = frame_head(name, payload)
        length = len(head) + len(payload)
        temporary = self.usage.writing / f"{os.getpid()}-{id(self):x}-{next(self._serial)}"
        reserved = False
        try:
            evicted = self.usage.reserve(length)
            if evicted is None:
                self._counters.add(backend_refused=1)
                return False
            reserved = True
            self._counters.add(backend_evicted_objects=evicted.objects, backend_evicted_bytes=evicted.bytes)
            with open(temporary, "xb", buffering=0) as file:
                _write_all(file.fileno(), [memoryview(head), payload])
            path.parent.mkdir(exist_ok=True)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):  # a disk that has become read-only
                temporary.unlink(missing_ok=True)
            if reserved:
                self.usage.release(length)
            self._refused(error)
            return False
        return True

    def close(self) -> None:
        self.usage.close()

    def _path(self, name: str) -> Path:
        digest = xxhash.xxh3_128_hexdigest(name.encode())
        return self.usage.objects / digest[:2] / digest[2:]

    def _refused(self, error: OSError) -> None:
        """Count an object that could not be written, and say so once in a while."""
        self._counters.add(backend_refused=1)
        self._refused_since_said += 1
        now_s = self._clock.now_s()
        if now_s >= self._say_again_s:
            self._say_again_s = now_s + _SAY_AGAIN_S
            text = "prfaas: %d objects were not stored in %s, prompts are computed again instead: %s"
            logger.warning(text, self._refused_since_said, self.usage.objects.parent, error.strerror or error)
            self._refused_since_said = 0

    def _drop(self, path: Path, length: int) -> None:
        """Delete what is no intact object."""
        self._counters.add(corrupt_objects=1)
        path.unlink(missing_ok=True)
        self.usage.release(length)


def _read_into(file: int, parts: list[memoryview]) -> bool:
    """Fill all of `parts`. False: the file ends before."""
    offset = 0
    for part in parts:
        done = 0
        while done < len(part):
            count = os.preadv(file, [part[done:]], offset)
            if not count:
                return False
            done += count
            offset += count
    return True


def _write_all(file: int, parts: list[memoryview]) -> None:
    for part in parts:
        done = 0
        while done < len(part):
            done += os.write(file, part[done:])
