from __future__ import annotations

import time
from pathlib import Path

import pytest

from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.hits import Need
from sglang_prfaas.store.stats import Counters, StatsFile, StatsWriter, StoreStats, read_stats
from sglang_prfaas.store.tiers import TieredStore

from .test_host_tier import PAGE_BYTES, STATE_BYTES, chain, page, tier

NAMES = {"kv": "d/kv", "mamba": "d/mamba"}
STATE = Need(component="mamba", policy="trailing_pages")


@pytest.fixture
def store(disk: DiskStore, counters: Counters) -> TieredStore:
    """No memory in front."""
    return TieredStore(disk, None, NAMES, counters)


def with_host(disk: DiskStore, counters: Counters, *, hybrid: bool = False, blocks: int = 64) -> TieredStore:
    host = tier(blocks, "linear" if hybrid else None)
    host._counters = counters
    return TieredStore(disk, host, NAMES, counters)


def write(store: TieredStore, keys: list[str], prefix: list[str] | None = None) -> None:
    assert all(store.write("kv", keys, [page(key) for key in keys], prefix))


def read(store: TieredStore, component: str, keys: list[str], prefix: list[str] | None = None) -> list[bytes | None]:
    outs = [bytearray(STATE_BYTES if component == "mamba" else PAGE_BYTES) for _ in keys]
    done = store.read(component, keys, [memoryview(out) for out in outs], prefix)
    return [bytes(out) if there else None for out, there in zip(outs, done, strict=True)]


def test_read_stops_at_the_first_gap(store: TieredStore, counters: Counters) -> None:
    keys = chain(1, 4)
    write(store, [keys[0], keys[1], keys[3]])
    assert store.hit(keys).pages == 2
    assert read(store, "kv", keys) == [bytes(page(keys[0])), bytes(page(keys[1])), None, None]
    assert (counters.stats.backend_hits, counters.stats.misses) == (2, 1)
    assert (counters.stats.queried_pages, counters.stats.usable_pages) == (4, 2)


def test_memory_serves_what_the_disk_has_lost(disk: DiskStore, counters: Counters) -> None:
    store, keys = with_host(disk, counters), chain(1, 3)
    write(store, keys, prefix=[])
    for key in keys:
        disk._path(f"d/kv/{key}").unlink()
    assert store.hit(keys).pages == 3
    assert read(store, "kv", keys, []) == [bytes(page(key)) for key in keys]
    assert (counters.stats.host_hits, counters.stats.backend_hits) == (3, 0)


def test_a_restarted_server_reads_the_disk_and_fills_its_memory(disk: DiskStore, counters: Counters) -> None:
    keys = chain(1, 3)
    write(with_host(disk, counters), keys, prefix=[])
    again = with_host(disk, counters)
    for expected in ((0, 3), (3, 3)):
        assert read(again, "kv", keys, []) == [bytes(page(key)) for key in keys]
        assert (counters.stats.host_hits, counters.stats.backend_hits) == expected


def test_a_state_counts_only_where_it_is(disk: DiskStore, counters: Counters) -> None:
    store, keys = with_host(disk, counters, hybrid=True), chain(1, 4)
    assert store.write("mamba", [keys[2]], [page(keys[2], STATE_BYTES)], keys[:2]) == [True]
    write(store, keys[:3], prefix=[])
    write(store, keys[3:], prefix=keys[:3])
    assert store.hit(keys, [STATE]).pages == 3
    assert store.hit(keys[:2], [STATE]).pages == 0
    assert read(store, "mamba", [keys[2]]) == [bytes(page(keys[2], STATE_BYTES))]
    assert read(store, "mamba", [keys[3]]) == [None]
    assert counters.stats.host_hits == 1


def test_without_the_prefix_only_the_disk_is_written(disk: DiskStore, counters: Counters) -> None:
    store, keys = with_host(disk, counters), chain(1, 2)
    write(store, keys)
    assert store.hit(keys).pages == 2
    assert counters.stats.host_written_bytes == 0


def test_a_store_that_refuses_says_so(tmp_path: Path, counters: Counters) -> None:
    store = TieredStore(DiskStore(tmp_path, 4096, counters), None, NAMES, counters)
    big = memoryview(bytes(8192))
    assert store.write("kv", chain(1, 1), [big]) == [False]
    assert counters.stats.backend_refused == 1
    assert counters.stats.backend_written_bytes == 0


def content(misses: int) -> StatsFile:
    return StatsFile(
        name="pd-p0",
        backend="local",
        pid=1,
        host_limit_bytes=1,
        backend_limit_bytes=2,
        host_used_bytes=3,
        backend_used_bytes=4,
        counters=StoreStats(misses=misses),
    )


def test_the_stats_file_follows_the_counters(tmp_path: Path) -> None:
    misses = 1
    writer = StatsWriter(tmp_path / "stats" / "pd-p0.json", lambda: content(misses), interval_s=0.01)

    def wait_for(expected: int) -> None:
        deadline = time.monotonic() + 60
        while not writer.path.exists() or read_stats(tmp_path / "stats") != [content(expected)]:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    wait_for(1)
    misses = 2
    wait_for(2)
    misses = 3
    writer.close()
    assert read_stats(tmp_path / "stats") == [content(3)]
    assert len(list((tmp_path / "stats").iterdir())) == 1


def test_a_directory_that_cannot_be_written_does_not_raise(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    writer = StatsWriter(tmp_path / "file" / "x.json", lambda: content(1))
    writer.close()
    assert isinstance(writer.last_error, OSError)
