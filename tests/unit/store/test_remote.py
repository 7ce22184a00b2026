"""The store with peers that are no network: what is asked, fetched, waited for and kept, and what comes of failures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from sglang_prfaas.clock import Deadline, MonotonicClock
from sglang_prfaas.errors import PeerGoneError
from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.fetch_choice import PeerEstimate, TokensPerSecond
from sglang_prfaas.store.fetch_plan import Groups
from sglang_prfaas.store.hits import Need
from sglang_prfaas.store.objects import frame_head
from sglang_prfaas.store.remote import FetchLimits, RemoteTier
from sglang_prfaas.store.staging import OpenRoom, on_the_heap
from sglang_prfaas.store.stats import Counters
from sglang_prfaas.store.tiers import TieredStore

from .test_host_tier import PAGE_BYTES, STATE_BYTES, chain, page, tier

NAMES = {"kv": "d/kv", "mamba": "d/mamba"}
PAYLOAD = {"kv": PAGE_BYTES, "mamba": STATE_BYTES}
STATE = Need(component="mamba", policy="trailing_pages")
PAGE_TOKENS = 16
SLOW, QUICK = 1.0, 1e12
"""Tokens that this site computes in a second."""


class FakePeer:
    """Holds frames by name. `gate`: opened, objects go out; `fail_after`: so many objects, then the connection ends."""

    def __init__(self, site: str = "pd") -> None:
        self.site = site
        self.frames: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.sent: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.fail_after = 1 << 60
        self.deaf = False

    def hold(self, component: str, keys: Sequence[str]) -> None:
        for key in keys:
            name = f"{NAMES[component]}/{key}"
            payload = page(key, PAYLOAD[component])
            self.frames[name] = frame_head(name, payload) + payload

    def ask(self, groups: Groups, deadline: Deadline) -> Sequence[int]:
        if self.deaf:
            raise PeerGoneError("nobody is there")
        names = [f"{namespace}/{key}" for namespace, keys in groups for key in keys]
        self.asked += names
        return [len(self.frames.get(name, b"")) for name in names]

    def get(
        self, groups: Groups, sizes: Sequence[int], take: Callable[[str, bytearray], None], deadline: Deadline
    ) -> bool:
        names = [f"{namespace}/{key}" for namespace, keys in groups for key in keys]
        for name, size in zip(names, sizes, strict=True):
            assert self.gate.wait(30.0)
            if len(self.sent) >= self.fail_after:
                raise PeerGoneError("cut")
            if name not in self.frames:
                return False
            assert len(self.frames[name]) == size
            self.sent.append(name)
            take(name, bytearray(self.frames[name]))
        return True

    def close(self) -> None:
        self.gate.set()


Make = Callable[..., TieredStore]


@pytest.fixture
def make(disk: DiskStore, counters: Counters) -> Iterator[Make]:
    """A store of this site with peers; closed in the end."""
    made: list[RemoteTier] = []

    def build(
        *peers: FakePeer,
        tokens_per_s: float = SLOW,
        max_bytes: int = 1 << 20,
        least: int = 0,
        open_room: OpenRoom = on_the_heap,
    ) -> TieredStore:
        remote = RemoteTier(
            [(peer, PeerEstimate(1e9, 0.0)) for peer in peers],
            TokensPerSecond(tokens_per_s),
            FetchLimits(margin=0.2, timeout_s=30.0, max_bytes=max_bytes, least_tokens=least),
            namespaces=NAMES,
            payload_bytes=PAYLOAD,
            page_tokens=PAGE_TOKENS,
            keep=disk.write,
            counters=counters,
            clock=MonotonicClock(),
            open_room=open_room,
        )
        made.append(remote)
        return TieredStore(disk, None, NAMES, counters, remote)

    yield build
    for remote in made:
        remote.close()


def read(store: TieredStore, component: str, keys: list[str]) -> list[bytes | None]:
    outs = [bytearray(PAYLOAD[component]) for _ in keys]
    done = store.read(component, keys, [memoryview(out) for out in outs], [])
    return [bytes(out) if there else None for out, there in zip(outs, done, strict=True)]


def settle(store: TieredStore) -> None:
    """Wait for the end of all fetches."""
    assert store.remote is not None
    for _, thread in list(store.remote._fetches.values()):
        thread.join(30.0)


def pages(keys: list[str], component: str = "kv") -> list[bytes]:
    return [bytes(page(key, PAYLOAD[component])) for key in keys]


def test_pages_that_only_the_peer_has_are_fetched_and_kept(make: Make, disk: DiskStore, counters: Counters) -> None:
    peer, keys = FakePeer(), chain(1, 5)
    peer.hold("kv", keys[:4])
    store = make(peer)
    store.write("kv", keys[:1], [page(keys[0])], [])
    hit = store.hit(keys)
    assert (hit.pages, hit.usable) == (4, (1, 2, 3, 4))
    assert read(store, "kv", keys[:4]) == pages(keys[:4])
    settle(store)
    assert peer.sent == [f"d/kv/{key}" for key in keys[1:4]], "only what was missing"
    assert all(disk.contains(f"d/kv/{key}") for key in keys[:4])
    stats = counters.stats
    assert (stats.fetches, stats.fetched_objects, stats.fetched_tokens) == (1, 3, 3 * PAGE_TOKENS)
    assert stats.fetched_bytes == sum(len(peer.frames[name]) for name in peer.sent)
    assert stats.fetch_saved_s == pytest.approx(30.0, abs=5.0), "as far as the timeout reaches"

    peer.deaf = True
    assert read(store, "kv", keys[:4]) == pages(keys[:4])


def test_a_hybrid_prefix_is_fetched_up_to_its_last_state_and_the_state_first(make: Make) -> None:
    peer, keys = FakePeer(), chain(1, 6)
    peer.hold("kv", keys)
    peer.hold("mamba", [keys[1], keys[3]])
    store = make(peer)
    hit = store.hit(keys, [STATE])
    assert (hit.pages, hit.usable) == (4, (4,)), "the state after two pages is not fetched"
    assert read(store, "kv", keys[:4]) == pages(keys[:4])
    assert read(store, "mamba", [keys[3]]) == pages([keys[3]], "mamba")
    assert peer.sent == [f"d/mamba/{keys[3]}", *(f"d/kv/{key}" for key in keys[:4])]
    settle(store)
    assert store.hit(keys, [STATE]).pages == 4


def test_fetches_wait_in_the_pool_and_give_their_blocks_back(make: Make, counters: Counters) -> None:
    host, peer, keys = tier(8), FakePeer(), chain(1, 5)
    peer.hold("kv", keys)
    peer.hold("mamba", keys)
    peer.gate.clear()
    store = make(peer, open_room=host.open_room)
    assert store.hit(keys, [STATE]).pages == 5
    assert host.pool.ledger.transfer_blocks == 8, "five pages, and three blocks of one state"
    other = chain(2, 1)
    peer.hold("kv", other)
    assert store.hit(other).pages == 0
    assert counters.stats.fetch_full == 1, "there is no room beside it"
    peer.gate.set()
    assert read(store, "mamba", keys[4:]) == pages(keys[4:], "mamba")
    assert read(store, "kv", keys) == pages(keys)
    settle(store)
    assert host.pool.ledger.transfer_blocks == 0
    assert store.hit(other).pages == 1


def test_without_a_state_nothing_is_fetched(make: Make, counters: Counters) -> None:
    peer, keys = FakePeer(), chain(1, 4)
    peer.hold("kv", keys)
    assert make(peer).hit(keys, [STATE]).pages == 0
    assert (peer.sent, counters.stats.fetch_questions) == ([], 1)


def test_what_is_quick_to_compute_is_not_even_asked_for_over_a_long_way(make: Make, counters: Counters) -> None:
    peer, keys = FakePeer(), chain(1, 4)
    peer.hold("kv", keys)
    store = make(peer, tokens_per_s=QUICK)
    assert store.remote is not None
    store.remote._peers[0][1].rtt_s = 0.05
    assert store.hit(keys).pages == 0
    assert (peer.asked, counters.stats.fetch_refused) == ([], 1)
    store.remote._peers[0][1].rtt_s = 0.0
    assert store.hit(keys).pages == 0
    assert (len(peer.asked), peer.sent, counters.stats.fetch_refused) == (4, [], 2)


def test_hits_that_sglang_would_not_use_are_left(make: Make) -> None:
    peer, keys = FakePeer(), chain(1, 8)
    peer.hold("kv", keys[:2])
    store = make(peer, least=64)
    assert store.hit(keys[:3]).pages == 0
    assert peer.asked == []
    assert store.hit(keys).pages == 0
    assert peer.sent == []


def test_a_reader_waits_and_a_second_request_shares_the_fetch(make: Make, counters: Counters) -> None:
    peer, keys = FakePeer(), chain(1, 3)
    peer.hold("kv", keys)
    peer.gate.clear()
    store = make(peer)
    assert store.hit(keys).pages == 3
    assert store.hit(keys).pages == 3
    found: list[list[bytes | None]] = []
    reader = threading.Thread(target=lambda: found.append(read(store, "kv", keys)))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive(), "it waits for what is on its way"
    peer.gate.set()
    reader.join(30.0)
    assert found == [pages(keys)]
    assert (len(peer.sent), counters.stats.fetches) == (3, 1)


def test_a_cut_fetch_is_a_miss_and_what_came_is_kept(make: Make, disk: DiskStore, counters: Counters) -> None:
    peer, keys = FakePeer(), chain(1, 4)
    peer.hold("kv", keys)
    peer.fail_after = 2
    store = make(peer)
    assert store.hit(keys).pages == 4
    assert read(store, "kv", keys) == [*pages(keys[:2]), None, None]
    settle(store)
    stats = counters.stats
    assert (stats.fetch_failed, stats.fetched_objects, stats.fetched_tokens, stats.fetch_saved_s) == (1, 2, 0, 0.0)
    asked = len(peer.asked)
    assert store.hit(keys).pages == 2, "the peer rests"
    assert len(peer.asked) == asked
    assert [disk.contains(f"d/kv/{key}") for key in keys] == [True, True, False, False]


def test_wrong_bytes_are_dropped(make: Make, counters: Counters) -> None:
    peer, keys = FakePeer(), chain(1, 3)
    peer.hold("kv", keys)
    name = f"d/kv/{keys[1]}"
    peer.frames[name] = peer.frames[name][:-1] + bytes([peer.frames[name][-1] ^ 1])
    other = f"d/kv/{keys[2]}"
    peer.frames[other] = peer.frames[f"d/kv/{keys[0]}"]
    store = make(peer)
    assert store.hit(keys).pages == 3
    assert read(store, "kv", keys) == [*pages(keys[:1]), None, None]
    settle(store)
    assert (counters.stats.corrupt_objects, counters.stats.fetch_failed) == (1, 1)


def test_objects_of_another_length_are_not_there(make: Make) -> None:
    peer, keys = FakePeer(), chain(1, 3)
    peer.hold("kv", keys)
    peer.frames[f"d/kv/{keys[2]}"] += b"x"
    assert make(peer).hit(keys).pages == 2


def test_what_the_peer_dropped_meanwhile_is_a_miss(make: Make, counters: Counters) -> None:
    peer, keys = FakePeer(), chain(1, 3)
    peer.hold("kv", keys)
    peer.gate.clear()
    store = make(peer)
    assert store.hit(keys).pages == 3
    del peer.frames[f"d/kv/{keys[1]}"]
    peer.gate.set()
    assert read(store, "kv", keys) == [*pages(keys[:1]), None, None]
    settle(store)
    assert counters.stats.fetch_failed == 1


def test_the_next_peer_is_asked_where_one_is_deaf(make: Make, counters: Counters) -> None:
    deaf, other, keys = FakePeer("pd-1"), FakePeer("pd-2"), chain(1, 3)
    deaf.deaf = True
    other.hold("kv", keys)
    store = make(deaf, other)
    assert store.hit(keys).pages == 3
    assert read(store, "kv", keys) == pages(keys)
    settle(store)
    assert counters.stats.fetch_failed == 1
    assert store.remote is not None
    assert [peer.site for peer in store.remote.peers()] == ["pd-1", "pd-2"]


def test_no_more_memory_than_allowed_is_used(make: Make, counters: Counters) -> None:
    peer, keys = FakePeer(), chain(1, 4)
    peer.hold("kv", keys)
    store = make(peer, max_bytes=3 * PAGE_BYTES)
    assert store.hit(keys).pages == 0
    assert (peer.sent, counters.stats.fetch_full) == ([], 1)


def test_at_most_four_fetches_are_under_way(make: Make, counters: Counters) -> None:
    peer = FakePeer()
    peer.gate.clear()
    store = make(peer)
    for seed in range(6):
        keys = chain(seed, 2)
        peer.hold("kv", keys)
        assert store.hit(keys).pages == (2 if seed < 4 else 0)
    assert (counters.stats.fetches, counters.stats.fetch_full) == (4, 2)


def test_closing_ends_what_is_under_way(make: Make) -> None:
    peer, keys = FakePeer(), chain(1, 3)
    peer.hold("kv", keys)
    peer.gate.clear()
    peer.fail_after = 0
    store = make(peer)
    assert store.hit(keys).pages == 3
    assert store.remote is not None
    store.remote.close()
    assert read(store, "kv", keys) == [None, None, None]
    assert store.hit(keys).pages == 0
