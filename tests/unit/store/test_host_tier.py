from __future__ import annotations

import random
from typing import Literal

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.prefix_cache.groups import Group, PoolLayout
from sglang_prfaas.store.host_tier import HostTier, PageLease
from sglang_prfaas.store.stats import Counters

PAGE_BYTES, STATE_BYTES = 64, 150


def tier(blocks: int, state: Literal["linear", "window"] | None = None) -> HostTier:
    groups = [Group(name="kv", kind="full", entry_bytes=PAGE_BYTES)]
    if state:
        groups.append(Group(name="mamba", kind=state, entry_bytes=STATE_BYTES))
    layout = PoolLayout(block_bytes=PAGE_BYTES, block_tokens=16, groups=tuple(groups))
    return HostTier(layout, blocks * PAGE_BYTES, Counters())


def page(key: str, length: int = PAGE_BYTES) -> memoryview:
    return memoryview(random.Random(key + str(length)).randbytes(length))


def read(host: HostTier, component: str, key: str) -> bytes | None:
    out = bytearray(STATE_BYTES if component == "mamba" else PAGE_BYTES)
    return bytes(out) if host.read(component, key, memoryview(out)) else None


def chain(seed: int, length: int) -> list[str]:
    return [f"{seed * 100 + number:064x}" for number in range(1, length + 1)]


def add(host: HostTier, keys: list[str], new: int) -> None:
    """The last `new` of a prompt's pages, the others being before them."""
    host.add(keys[:-new], [(key, page(key)) for key in keys[-new:]])


def test_pages_are_read_as_they_were_written() -> None:
    host, keys = tier(8), chain(1, 3)
    add(host, keys, 3)
    assert [read(host, "kv", key) for key in keys] == [bytes(page(key)) for key in keys]
    assert read(host, "kv", chain(2, 1)[0]) is None
    assert read(host, "mamba", keys[2]) is None
    assert host.used_bytes() == 3 * PAGE_BYTES


def test_pages_after_a_gap_are_left_out() -> None:
    host, keys = tier(8), chain(1, 4)
    add(host, keys, 2)
    assert not any(host.contains("kv", key) for key in keys)
    assert host.used_bytes() == 0
    add(host, keys[:2], 2)
    add(host, keys, 2)
    assert all(host.contains("kv", key) for key in keys)


def test_a_hybrid_prefix_is_held_when_state_and_all_pages_have_come() -> None:
    host, keys = tier(16, "linear"), chain(1, 4)
    host.begin(keys, [4])
    host.put("mamba", keys[3], page(keys[3], STATE_BYTES))
    for key in keys[:3]:
        host.put("kv", key, page(key))
        assert read(host, "kv", key) is None
    host.put("kv", keys[3], page(keys[3]))
    assert [read(host, "kv", key) for key in keys] == [bytes(page(key)) for key in keys]
    assert read(host, "mamba", keys[3]) == bytes(page(keys[3], STATE_BYTES))
    assert read(host, "mamba", keys[2]) is None
    assert host.used_bytes() == (4 + 3) * PAGE_BYTES


def test_what_never_gets_complete_gives_its_room_back() -> None:
    host, keys = tier(16, "linear"), chain(1, 4)
    host.begin(keys, [4])
    host.put("mamba", keys[3], page(keys[3], STATE_BYTES))
    host.begin(chain(2, 2), [2])
    assert host.used_bytes() == (2 + 3) * PAGE_BYTES
    host.abandon()
    assert host.used_bytes() == 0


def test_pages_that_come_before_any_state_wait_for_one() -> None:
    host, keys = tier(64, "window"), chain(1, 6)
    for key in keys[:4]:
        host.put("kv", key, page(key))
    assert host.used_bytes() == 0
    host.begin(keys, [5, 6])
    for key in keys[4:]:
        host.put("mamba", key, page(key, STATE_BYTES))
        host.put("kv", key, page(key))
    assert [read(host, "kv", key) for key in keys] == [bytes(page(key)) for key in keys]
    for key in chain(2, 20):
        host.put("kv", key, page(key))
    assert len(host._waiting) == 64 // 8


def test_each_page_of_a_window_is_a_state_of_its_own() -> None:
    host, keys = tier(32, "window"), chain(1, 4)
    host.begin(keys, [3, 4])
    for key in keys[2:]:
        host.put("mamba", key, page(key, STATE_BYTES))
    for key in keys:
        host.put("kv", key, page(key))
    assert [host.contains("mamba", key) for key in keys] == [False, False, True, True]


def test_a_prefix_beyond_the_whole_memory_is_refused() -> None:
    host = tier(3)
    add(host, chain(1, 4), 4)
    assert host.used_bytes() == 0
    assert host._counters.stats.host_refused == 1


def test_what_was_used_longest_ago_goes_first() -> None:
    host = tier(4)
    old, kept, new = chain(1, 2), chain(2, 2), chain(3, 2)
    add(host, old, 2)
    add(host, kept, 2)
    add(host, new, 2)
    assert not host.contains("kv", old[0])
    assert host.contains("kv", kept[1])
    assert host.contains("kv", new[1])
    assert host._counters.stats.host_evicted_blocks == 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8), st.booleans(), st.booleans()), max_size=40))
def test_only_whole_prefixes_with_their_own_bytes(steps: list[tuple[int, int, bool, bool]]) -> None:
    """Prompts of different lengths, complete or not, dense and hybrid."""
    dense, hybrid = tier(12), tier(20, "linear")
    for seed, length, complete, reads in steps:
        keys = chain(seed, length)
        add(dense, keys, length)
        hybrid.begin(keys, [length])
        hybrid.put("mamba", keys[-1], page(keys[-1], STATE_BYTES))
        for key in keys if complete else keys[:-1]:
            hybrid.put("kv", key, page(key))
        if reads:
            read(hybrid, "mamba", keys[-1])
        for host in (dense, hybrid):
            for other in range(1, 7):
                held = [read(host, "kv", key) for key in chain(other, 8)]
                count = next((i for i, data in enumerate(held) if data is None), len(held))
                assert not any(held[count:])
                assert held[:count] == [bytes(page(key)) for key in chain(other, count)]
            assert host.used_bytes() <= 20 * PAGE_BYTES
        for other in range(1, 7):
            for key in chain(other, 8):
                state = read(hybrid, "mamba", key)
                assert state is None or state == bytes(page(key, STATE_BYTES))
                assert state is None or hybrid.contains("kv", key)


def test_what_is_read_is_neither_evicted_nor_overwritten() -> None:
    host, held, other = tier(4), chain(1, 3), chain(2, 3)
    add(host, held, 3)
    with host.lease("kv", held) as lease:
        add(host, other, 3)
        assert host._counters.stats.host_refused == 1, "there is no room for it beside what is read"
        out = bytearray(PAGE_BYTES)
        for index, key in enumerate(held):
            lease.copy(index, memoryview(out))
            assert out == page(key)
    add(host, other, 3)
    assert [host.contains("kv", key) for key in (held[2], other[2])] == [False, True]


@settings(max_examples=150, deadline=None)
@given(
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["write", "lease", "end"]), st.integers(1, 6), st.integers(1, 8)), max_size=40),
)
def test_leased_pages_keep_their_bytes_whatever_is_written(hybrid: bool, steps: list[tuple[str, int, int]]) -> None:
    """Leases that overlap, of pages and states, while other prompts want the room."""
    host = tier(24, "linear") if hybrid else tier(12)
    open_leases: list[tuple[str, list[str], PageLease]] = []
    for kind, seed, length in steps:
        keys = chain(seed, length)
        if kind == "write" and hybrid:
            host.begin(keys, [length])
            host.put("mamba", keys[-1], page(keys[-1], STATE_BYTES))
            for key in keys:
                host.put("kv", key, page(key))
        elif kind == "write":
            add(host, keys, length)
        elif kind == "lease":
            open_leases.append(("kv", keys, host.lease("kv", keys)))
            if hybrid:
                open_leases.append(("mamba", keys[-1:], host.lease("mamba", keys[-1:])))
        elif open_leases:
            with open_leases.pop(seed % len(open_leases))[2]:
                pass
        for component, held, lease in open_leases:
            size = STATE_BYTES if component == "mamba" else PAGE_BYTES
            for index in range(len(lease)):
                out = bytearray(size)
                lease.copy(index, memoryview(out))
                assert out == page(held[index], size)
                assert host.contains(component, held[index])
    for _, _, lease in open_leases:
        with lease:
            pass
    host.abandon()
    assert host.pool._tree.evictable_blocks == host.pool.ledger.prefix_blocks, "nothing is held any more"


def test_transfers_and_prefixes_keep_their_floors() -> None:
    host = HostTier(tier(1).pool.layout, 10 * PAGE_BYTES, Counters(), prefix_floor=0.4, transfer_floor=0.2)
    prompt = chain(1, 8)
    add(host, prompt, 8)
    assert host.contains("kv", prompt[7]), "all but the transfers' floor"
    add(host, chain(2, 9), 9)
    assert host._counters.stats.host_refused == 1
    within = host.open_room([PAGE_BYTES, PAGE_BYTES])
    assert within is not None
    assert host.contains("kv", prompt[7]), "a transfer within its floor evicts nothing"
    beyond = host.open_room([PAGE_BYTES] * 4)
    assert beyond is not None
    assert [host.contains("kv", key) for key in prompt] == [True] * 4 + [False] * 4
    assert host.open_room([1]) is None, "the rest is the prefixes' floor"
    beyond.close()
    within.close()
    assert host.open_room([PAGE_BYTES] * 6) is not None


def test_what_waits_in_the_pool_is_read_as_it_came() -> None:
    host = tier(8)
    room = host.open_room([PAGE_BYTES, STATE_BYTES])
    assert room is not None
    for name, size in (("page", PAGE_BYTES), ("state", STATE_BYTES)):
        assert room.size(name) == -1
        room.put(name, page(name, size))
    add(host, chain(1, 4), 4)
    for name, size in (("page", PAGE_BYTES), ("state", STATE_BYTES)):
        out = bytearray(room.size(name))
        room.copy(name, memoryview(out))
        assert out == page(name, size)
    assert room.names() == ("page", "state")
