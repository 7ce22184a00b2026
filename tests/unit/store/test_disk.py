from __future__ import annotations

import errno
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.store import usage
from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.stats import Counters


def payload(name: str, length: int = 5000) -> bytes:
    return random.Random(name).randbytes(length)


def read(store: DiskStore, name: str, length: int = 5000) -> bytes | None:
    out = bytearray(length)
    return bytes(out) if store.read(name, memoryview(out)) else None


def files(store: DiskStore) -> list[Path]:
    return sorted(path for path in store.usage.objects.rglob("*") if path.is_file())


def bytes_on_disk(store: DiskStore) -> int:
    return sum(usage.allocated_bytes(path.stat().st_size) for path in files(store))


def open_again(store: DiskStore, limit_bytes: int = 64 << 20) -> DiskStore:
    return DiskStore(store.usage.objects.parent, limit_bytes, Counters())


def test_what_is_written_is_read_also_by_another_process_later(disk: DiskStore) -> None:
    assert not disk.contains("m/kv/1")
    assert disk.write("m/kv/1", memoryview(payload("1")))
    assert disk.contains("m/kv/1")
    other = open_again(disk)
    assert read(other, "m/kv/1") == payload("1")
    assert read(other, "m/kv/2") is None
    assert other.usage.used_bytes() == bytes_on_disk(disk) == 8192
    other.close()


def test_writing_again_changes_nothing(disk: DiskStore) -> None:
    assert disk.write("a", memoryview(payload("a")))
    used = disk.usage.used_bytes()
    assert disk.write("a", memoryview(payload("a")))
    assert disk.usage.used_bytes() == used


def test_the_wrong_length_is_a_miss_and_drops_the_object(disk: DiskStore, counters: Counters) -> None:
    disk.write("a", memoryview(payload("a")))
    assert read(disk, "a", 4999) is None
    assert counters.stats.corrupt_objects == 1
    assert not disk.contains("a")
    assert disk.usage.used_bytes() == 0


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 1100), flip=st.integers(0, 8 * 1100))
def test_torn_and_changed_files_are_dropped(tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int) -> None:
    counters = Counters()
    store = DiskStore(tmp_path_factory.mktemp("torn"), 1 << 20, counters)
    store.write("a", memoryview(payload("a", 1000)))
    store.write("b", memoryview(payload("b", 1000)))
    for path, name in ((store._path("a"), "a"), (store._path("b"), "b")):
        whole = path.read_bytes()
        if name == "a":
            path.write_bytes(whole[: min(cut, len(whole) - 1)])
        else:
            changed = bytearray(whole)
            changed[flip // 8 % len(whole)] ^= 1 << flip % 8
            path.write_bytes(changed)
        assert read(store, name, 1000) is None
        assert not path.exists()
    assert counters.stats.corrupt_objects == 2
    assert store.write("a", memoryview(payload("a", 1000)))
    assert read(store, "a", 1000) == payload("a", 1000)
    store.close()


def test_a_full_directory_loses_what_was_used_longest_ago(tmp_path: Path, counters: Counters) -> None:
    store = DiskStore(tmp_path, 10 * 8192, counters)
    for number in range(10):
        store.write(str(number), memoryview(payload(str(number))))
        os.utime(store._path(str(number)), ns=(number, number))
    assert read(store, "0") is not None  # used now
    assert store.write("new", memoryview(payload("new")))
    assert bytes_on_disk(store) <= 9 * 8192
    assert store.contains("0")
    assert not store.contains("1")
    assert store.contains("9")
    assert counters.stats.backend_evicted_objects == 2
    assert counters.stats.backend_evicted_bytes == 2 * 8192
    store.close()


def test_an_object_beyond_the_limit_is_refused(tmp_path: Path, counters: Counters) -> None:
    store = DiskStore(tmp_path, 1 << 20, counters)
    store.write("small", memoryview(payload("small")))
    assert not store.write("large", memoryview(bytes(1 << 20)))
    assert store.contains("small")
    assert counters.stats.backend_refused == 1
    store.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30_000), st.booleans()), max_size=60))
def test_the_limit_always_holds(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, bool]]) -> None:
    store = DiskStore(tmp_path_factory.mktemp("limit"), 100_000, Counters())
    lengths: dict[str, int] = {}
    for number, length, reopen in steps:
        name = f"{number}"
        length = lengths.setdefault(name, length)
        assert store.write(name, memoryview(payload(name, length)))
        assert read(store, name, length) == payload(name, length)
        assert bytes_on_disk(store) == store.usage.used_bytes() <= 100_000
        if reopen:
            store.close()
            store = open_again(store, 100_000)
    store.close()


def test_a_lower_limit_holds_from_the_start(disk: DiskStore) -> None:
    for number in range(20):
        disk.write(str(number), memoryview(payload(str(number))))
    smaller = open_again(disk, 5 * 8192)
    assert bytes_on_disk(disk) <= 5 * 8192
    smaller.close()


@pytest.mark.parametrize("step", ["write", "replace"])
def test_an_error_of_the_disk_is_a_miss(
    disk: DiskStore, counters: Counters, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.write" if step == "write" else "pathlib.Path.replace", fail)
    assert not disk.write("a", memoryview(payload("a")))
    monkeypatch.undo()
    assert counters.stats.backend_refused == 1
    assert disk.usage.used_bytes() == 0
    assert not list(disk.usage.writing.iterdir())
    assert disk.write("a", memoryview(payload("a")))


def test_unfinished_files_count_until_they_are_old(disk: DiskStore) -> None:
    abandoned = disk.usage.writing / "1-1-1"
    abandoned.write_bytes(bytes(8192))
    again = open_again(disk)
    assert abandoned.exists()
    assert again.usage.used_bytes() == 8192
    again.close()
    old_s = time.time() - usage.ABANDONED_S - 1
    os.utime(abandoned, (old_s, old_s))
    again = open_again(disk)
    assert not abandoned.exists()
    assert again.usage.used_bytes() == 0
    again.close()


@pytest.mark.parametrize("wrong", [b"", b"abc", bytes([255] * 8)])
def test_a_wrong_total_is_counted_again(disk: DiskStore, wrong: bytes) -> None:
    disk.write("a", memoryview(payload("a")))
    (disk.usage.objects.parent / "usage").write_bytes(wrong)
    assert disk.write("b", memoryview(payload("b")))
    assert disk.usage.used_bytes() == bytes_on_disk(disk) == 2 * 8192


LIMIT_BYTES = 40 * 8192


def _write_for_ever(directory: str, seed: int) -> None:
    store = DiskStore(Path(directory), LIMIT_BYTES, Counters())
    choose = random.Random(seed)
    while True:
        name = str(choose.randrange(80))
        store.write(name, memoryview(payload(name)))
        got = read(store, str(choose.randrange(80)))
        assert got is None or len(got) == 5000


def test_processes_share_a_directory_and_may_be_killed(tmp_path: Path) -> None:
    """Three processes write; each is killed wherever it is; what is left is whole, and within the limit."""
    context = multiprocessing.get_context("spawn")
    watcher = DiskStore(tmp_path, LIMIT_BYTES, Counters())
    for round_ in range(2):
        writers = [
            context.Process(target=_write_for_ever, args=(str(tmp_path), 3 * round_ + i), daemon=True) for i in range(3)
        ]
        for writer in writers:
            writer.start()
        deadline = time.monotonic() + 60
        while len(files(watcher)) < 30 and time.monotonic() < deadline:
            time.sleep(0.01)
        for writer in writers:
            assert writer.pid is not None
            assert writer.is_alive()
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    after = DiskStore(tmp_path, LIMIT_BYTES, counters := Counters())
    assert bytes_on_disk(after) <= LIMIT_BYTES
    there = [name for name in map(str, range(80)) if after.contains(name)]
    assert len(there) >= 20
    for name in there:
        assert read(after, name) == payload(name)
    assert counters.stats.corrupt_objects == 0
    after.close()
    watcher.close()


@dataclass
class SetClock:
    seconds: float = 100.0

    def now_s(self) -> float:
        return self.seconds


def test_a_full_disk_is_said_once_a_minute(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has become read-only: then nothing can be deleted either."""
    clock = SetClock()
    store = DiskStore(tmp_path / "store", 64 << 20, Counters(), clock)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("os.write", fail)
    monkeypatch.setattr("pathlib.Path.unlink", fail)
    for at_s in (100.0, 101.0, 120.0, 161.0):
        clock.seconds = at_s
        assert not store.write(str(at_s), memoryview(payload("a")))
    monkeypatch.undo()
    place = f"in {tmp_path / 'store'}, prompts are computed again instead: Read-only file system"
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"prfaas: 1 objects were not stored {place}", f"prfaas: 3 objects were not stored {place}"]
    assert store.write("a", memoryview(payload("a")))
    store.close()
