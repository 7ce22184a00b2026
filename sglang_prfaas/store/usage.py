"""How much a shared directory holds, and what is deleted when it is too much. For several processes of one host.

The total stands in a file, changed only under a file lock. Before it would pass the limit, the directory is walked,
which also repairs a total that a killed process left wrong, and the objects used longest ago are deleted down to nine
tenths of the limit. An object's time of use is its modification time.
"""

from __future__ import annotations

import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from msgspec import Struct

LOW_WATER = 0.9
ABANDONED_S = 600.0
"""Age from which a file that was never finished belongs to nobody."""
_TOTAL = struct.Struct("<Q")
_BLOCK_BYTES = 4096


class Evicted(Struct, frozen=True):
    """What room for an object cost."""

    objects: int = 0
    bytes: int = 0


def allocated_bytes(length: int) -> int:
    """What a file of this length takes on disk, in whole blocks of the file system."""
    return -(-length // _BLOCK_BYTES) * _BLOCK_BYTES


class DirectoryUsage:
    """The account of `directory`: finished objects in `objects/`, unfinished ones in `writing/`. Raises OSError where
    the directory cannot be made or used."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.objects = directory / "objects"
        self.writing = directory / "writing"
        self.limit_bytes = limit_bytes
        for path in (self.objects, self.writing):
            path.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = os.open(directory / "usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        with self._locked():
            self._save(self._make_room(limit_bytes)[0])

    def reserve(self, length: int) -> Evicted | None:
        """Room for an object of this length, before it is written. None: it is larger than the whole limit."""
        wanted = allocated_bytes(length)
        if wanted > self.limit_bytes:
            return None
        with self._locked():
            total, evicted = self._load(), Evicted()
            if total is None or total + wanted > self.limit_bytes:
                total, evicted = self._make_room(int(self.limit_bytes * LOW_WATER) - wanted)
            self._save(total + wanted)
        return evicted

    def release(self, length: int) -> None:
        """An object was deleted, or not written after all."""
        with self._locked():
            self._save(max(0, (self._load() or 0) - allocated_bytes(length)))

    def used_bytes(self) -> int:
        with self._locked():
            return self._load() or 0

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def _load(self) -> int | None:
        data = os.pread(self._file, _TOTAL.size, 0)
        return int(_TOTAL.unpack(data)[0]) if len(data) == _TOTAL.size else None

    def _save(self, total: int) -> None:
        os.pwrite(self._file, _TOTAL.pack(total), 0)

    def _make_room(self, target: int) -> tuple[int, Evicted]:
        """Delete until at most `target` bytes are left: the exact total, and what went."""
        found = list(_walk(self.objects))
        total = sum(size for _, size, _ in found)
        for used_ns, size, path in _walk(self.writing):
            if time.time() - used_ns / 1e9 > ABANDONED_S:
                _delete(path)
            else:
                total += size
        objects = freed = 0
        for _, size, path in sorted(found):
            if total - freed <= target:
                break
            _delete(path)
            objects += 1
            freed += size
        return total - freed, Evicted(objects, freed)


def _walk(directory: Path) -> Iterator[tuple[int, int, str]]:
    """(time of use in ns, bytes on disk, path) of every file below; those deleted meanwhile are left out."""
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    yield from _walk(Path(entry.path))
                else:
                    status = entry.stat(follow_symlinks=False)
                    yield status.st_mtime_ns, allocated_bytes(status.st_size), entry.path
            except FileNotFoundError:
                continue


def _delete(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
