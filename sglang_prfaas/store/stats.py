"""Counters of a store, and the JSON file they are written to for `launch cache` and other readers."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct


class StoreStats(Struct, kw_only=True):
    """Since the process started. Objects are pages and states; `_bytes` are payload."""

    host_hits: int = 0
    host_read_bytes: int = 0
    host_written_bytes: int = 0
    host_evicted_blocks: int = 0
    host_refused: int = 0
    """Objects that did not fit into host memory beside what may not be evicted."""
    backend_hits: int = 0
    backend_read_bytes: int = 0
    backend_written_bytes: int = 0
    backend_evicted_objects: int = 0
    backend_evicted_bytes: int = 0
    backend_refused: int = 0
    """Objects larger than the limit, or that could not be written."""
    corrupt_objects: int = 0
    misses: int = 0
    """Reads that no tier could serve."""
    queries: int = 0
    queried_pages: int = 0
    usable_pages: int = 0
    fetch_questions: int = 0
    """Asked of other sites."""
    fetches: int = 0
    fetched_objects: int = 0
    fetched_bytes: int = 0
    """That came intact, with their frames."""
    fetched_tokens: int = 0
    """Of fetches that ended well."""
    fetch_refused: int = 0
    """Not fetched, as computing was expected to be quicker."""
    fetch_full: int = 0
    """Not fetched, as too much was under way."""
    fetch_failed: int = 0
    """Questions and fetches that did not end well."""
    fetch_saved_s: float = 0.0
    """Expected seconds to compute what was fetched, less the seconds that it took; as far as the timeout reaches."""


class PeerStats(Struct, frozen=True, kw_only=True):
    """What is expected of another site's prefix cache now."""

    site: str
    bytes_per_s: float
    rtt_s: float


class StatsFile(Struct, frozen=True, kw_only=True):
    """What the file holds. `used_bytes`: of the directory or the segment this process sees, all servers together."""

    name: str
    backend: str
    pid: int
    host_limit_bytes: int
    backend_limit_bytes: int
    host_used_bytes: int
    backend_used_bytes: int
    counters: StoreStats
    peers: tuple[PeerStats, ...] = ()


class Counters:
    """StoreStats for several threads."""

    def __init__(self) -> None:
        self.stats = StoreStats()
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self.stats, name, getattr(self.stats, name) + amount)

    def snapshot(self) -> StoreStats:
        with self._lock:
            return msgspec.structs.replace(self.stats)


class StatsWriter:
    """A thread that writes the file every `interval_s` while something changes, and once more at the end; whole or not
    at all. A full disk must not stop a server, so an OSError is kept in `last_error`, not raised."""

    def __init__(self, path: Path, content: Callable[[], StatsFile], interval_s: float = 2.0) -> None:
        self.path = path
        self.last_error: OSError | None = None
        self._content = content
        self._interval_s = interval_s
        self._written: StatsFile | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefix-cache-stats", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        self._write()
        while not self._stop.wait(self._interval_s):
            self._write()
        self._write()

    def _write(self) -> None:
        content = self._content()
        if content == self._written:
            return
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2))
            temporary.replace(self.path)
            self._written = content
        except OSError as error:
            self.last_error = error


def read_stats(directory: Path) -> list[StatsFile]:
    """All files of a directory, by name. Raises OSError, msgspec.ValidationError for what is no such file."""
    return [
        msgspec.json.decode(path.read_bytes(), type=StatsFile)
        for path in sorted(directory.glob("*.json"))
        if not path.name.startswith(".")
    ]
