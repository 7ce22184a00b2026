"""Objects in host memory, by the rules of `HybridPool`: whole prefixes, checkpoints, eviction with costs, floors.

The pool takes a prefix with all that makes it usable at once. SGLang hands a hybrid model's state first and its KV in
batches after it, so a prefix is begun with its state and is reusable when its last page has come. One that never gets
complete gives its room back when the next begins. Pages before the part that has a state come earlier, without one (a
window's, for instance); they wait beside the pool, in an eighth of the memory, for a prefix that needs them.
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Iterable, Sequence
from types import TracebackType

from sglang_prfaas.errors import PoolFullError
from sglang_prfaas.prefix_cache.groups import PoolLayout
from sglang_prfaas.prefix_cache.ledger import Blocks
from sglang_prfaas.prefix_cache.pool import HybridPool, Lease, Ticket
from sglang_prfaas.store.staging import PoolRoom, Room
from sglang_prfaas.store.stats import Counters

FETCH_BYTES_PER_S = 1e9
"""What a page costs to fetch again from the tier behind: decides the order of eviction only by ratios of sizes."""

Page = tuple[str, memoryview]


class PageLease:
    """Pages or states that are held for reading; a context manager. `len`: how many."""

    def __init__(self, tier: HostTier, blocks: Sequence[Blocks], leases: Sequence[Lease]) -> None:
        self._tier, self._blocks, self._leases = tier, blocks, leases

    def __len__(self) -> int:
        return len(self._blocks)

    def copy(self, index: int, out: memoryview) -> None:
        """Copy one to `out`, of exactly its length."""
        self._tier.copy(self._blocks[index], out, to_arena=False)

    def __enter__(self) -> PageLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tier.release(self._leases)
        self._leases = ()


class HostTier:
    """Pages (component `kv`) and, for a hybrid model, one component of states. Safe for several threads."""

    def __init__(
        self,
        layout: PoolLayout,
        limit_bytes: int,
        counters: Counters,
        *,
        prefix_floor: float = 0.0,
        transfer_floor: float = 0.0,
    ) -> None:
        """prefix_floor, transfer_floor: shares of the memory that the other side can not take."""
        self._waiting_pages = limit_bytes // layout.block_bytes // 8 if layout.hybrid else 0
        self._waiting: dict[str, bytes] = {}  # oldest first
        blocks = limit_bytes // layout.block_bytes - self._waiting_pages
        self.pool = HybridPool(
            layout,
            blocks,
            prefix_floor_blocks=int(prefix_floor * blocks),
            transfer_floor_blocks=int(transfer_floor * blocks),
        )
        self.state_component = next((group.name for group in layout.groups if group.kind != "full"), None)
        self._page_bytes = next(group.entry_bytes for group in layout.groups if group.kind == "full")
        self._counters = counters
        self._arena = memoryview(mmap.mmap(-1, blocks * layout.block_bytes))
        self._lock = threading.RLock()
        self._ticket: Ticket | None = None
        self._missing: dict[tuple[str, str], Blocks] = {}

    def contains(self, component: str, key: str) -> bool:
        with self._lock:
            return bool(self._blocks(component, key))

    def lease(self, component: str, keys: Sequence[str]) -> PageLease:
        """Hold the first of these consecutive pages or states, as many as are here: until the lease ends they are
        neither evicted nor overwritten, and are read without keeping others waiting."""
        with self._lock:
            held = list(itertools.takewhile(bool, (self._blocks(component, key) for key in keys)))
            # A page stays as long as any page after it: the last one is enough for all. States are held each.
            first = 0 if component == self.state_component else max(0, len(held) - 1)
            leases = [lease for key in keys[first : len(held)] if (lease := self.pool.hold(_hash(key))) is not None]
        return PageLease(self, held, leases)

    def release(self, leases: Sequence[Lease]) -> None:
        """End what `lease` began; the pages count as used now."""
        with self._lock:
            for lease in leases:
                self.pool.release(lease)

    def read(self, component: str, key: str, out: memoryview) -> bool:
        """Copy a page or state to `out`, of exactly its length. False where it is not held."""
        with self.lease(component, [key]) as held:
            if held:
                held.copy(0, out)
            return bool(held)

    def used(self, key: str) -> None:
        """The prefix that ends with this page was read."""
        with self._lock:
            self.pool.touch(_hash(key))

    def add(self, prefix: Sequence[str], pages: Sequence[Page]) -> None:
        """Keep pages of a model without state, if all of `prefix` before them is held."""
        with self._lock:
            self.begin([*prefix, *(key for key, _ in pages)], ())
            for key, payload in pages:
                self.put("kv", key, payload)
            self.abandon()

    def begin(self, chain: Sequence[str], states_at: Iterable[int]) -> None:
        """Make room for a prefix: `chain` names all its pages, `states_at` after how many pages its states are."""
        with self._lock:
            self.abandon()
            cost_s = self._page_bytes / FETCH_BYTES_PER_S
            evicted_before = self.pool.evicted_blocks
            try:
                self._ticket = self.pool.store([_hash(key) for key in chain], [cost_s] * len(chain), states_at)
            except PoolFullError:
                self._counters.add(host_refused=1)
            self._counters.add(host_evicted_blocks=self.pool.evicted_blocks - evicted_before)
            if self._ticket is not None:
                self._missing = {("kv", chain[index]): blocks for index, blocks in self._ticket.kv.items()}
                for length, blocks in self._ticket.states.items():
                    self._missing[self.state_component or "", chain[length - 1]] = blocks
                for key in [key for component, key in self._missing if component == "kv" and key in self._waiting]:
                    self.put("kv", key, memoryview(self._waiting.pop(key)))

    def put(self, component: str, key: str, payload: memoryview) -> None:
        """One of the objects that the prefix begun last still lacks, or a page for one to come."""
        with self._lock:
            blocks = self._missing.pop((component, key), None)
            if blocks is None or self._ticket is None:
                if component == "kv":
                    self._wait(key, payload)
                return
            self.copy(blocks, payload, to_arena=True)
            self._counters.add(host_written_bytes=len(payload))
            if not self._missing:
                self.pool.commit(self._ticket)
                self._ticket = None

    def abandon(self) -> None:
        """Give up the prefix begun last, if it is not complete."""
        with self._lock:
            if self._ticket is not None:
                self.pool.abort(self._ticket)
            self._ticket, self._missing = None, {}

    def open_room(self, sizes: Sequence[int]) -> Room | None:
        """Blocks for objects of these sizes that are on their way; prefixes give way down to their floor. None: there
        are not enough."""
        blocks = sum(map(self.blocks_for, sizes))
        with self._lock:
            evicted_before = self.pool.evicted_blocks
            try:
                transfer = self.pool.open_transfer(blocks * self.pool.layout.block_bytes)
            except PoolFullError:
                return None
            finally:
                self._counters.add(host_evicted_blocks=self.pool.evicted_blocks - evicted_before)

        def give_back() -> None:
            with self._lock:
                self.pool.close_transfer(transfer)

        return PoolRoom(self, transfer.blocks, give_back)

    def blocks_for(self, nbytes: int) -> int:
        """Blocks that an object takes."""
        return self.pool.layout.blocks_for_bytes(nbytes)

    def used_bytes(self) -> int:
        with self._lock:
            return self.pool.ledger.prefix_blocks * self.pool.layout.block_bytes

    def _wait(self, key: str, payload: memoryview) -> None:
        if self._waiting_pages and not self.contains("kv", key):
            self._waiting.pop(key, None)
            self._waiting[key] = bytes(payload)
            while len(self._waiting) > self._waiting_pages:
                del self._waiting[next(iter(self._waiting))]

    def _blocks(self, component: str, key: str) -> Blocks:
        kv, state = self.pool.blocks_of(_hash(key))
        if component == "kv":
            return kv
        return state if component == self.state_component else ()

    def copy(self, blocks: Blocks, data: memoryview, *, to_arena: bool) -> None:
        """Bytes into blocks, or out of them. The blocks must be held: nobody is kept from them here."""
        size = self.pool.layout.block_bytes
        for number, block in enumerate(blocks):
            part = data[number * size : (number + 1) * size]
            place = self._arena[block * size : block * size + len(part)]
            if to_arena:
                place[:] = part
            else:
                part[:] = place


def _hash(key: str) -> int:
    """The pool names nodes by numbers; SGLang's page hashes are hexadecimal."""
    return int(key, 16)
