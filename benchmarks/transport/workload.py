"""What is moved: the shapes of requests, as memory full of random bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import xxhash
from msgspec import Struct

from sglang_prfaas.transport.layout import Component, Layout
from sglang_prfaas.transport.memory import HostBuffer, RankMemory

Bytes = npt.NDArray[np.uint8]

SEND_SEED, RECEIVE_SEED = 1, 2
"""Of the order in which a request's pages lie in either end's memory."""


class Workload(Struct, frozen=True):
    """`pages` scattered pages of `page_bytes` in each of `layers` buffers, and `states` items of `state_bytes`.

    one_by_one: each page is handed over when the one before is acknowledged. prefill_s: so long a prefill takes that
    computes layer after layer, see `order`; 0: all is there at the beginning."""

    name: str
    layers: int
    pages: int
    page_bytes: int
    states: int
    state_bytes: int
    one_by_one: bool = False
    prefill_s: float = 0.0

    @property
    def layout(self) -> Layout:
        return Layout(
            model=self.name,
            kv_dtype="bytes",
            page_tokens=64,
            tp_size=1,
            kv_format="",
            layer_ids=tuple(range(self.layers)),
            components=(
                Component("kv", (self.page_bytes,) * self.layers),
                Component("state", (self.state_bytes,) * self.states),
            ),
        )

    @property
    def total_bytes(self) -> int:
        return self.layout.request_bytes((self.pages, 1))

    @property
    def order(self) -> list[tuple[int, int]]:
        """Component and buffer of each layer, as a model computes them: a few with a state, then one with pages."""
        each = self.states // self.layers
        return [
            place
            for layer in range(self.layers)
            for place in (*((1, layer * each + index) for index in range(each)), (0, layer))
        ]

    @property
    def items(self) -> int:
        return self.layers * self.pages + self.states


WORKLOADS = {
    "hybrid": Workload("hybrid", 16, 512, 73_728, 48, 2 << 20),
    "hybrid-layers": Workload("hybrid-layers", 16, 512, 73_728, 48, 2 << 20, prefill_s=5.9),
    "dense": Workload("dense", 48, 512, 64 << 10, 1, 64),
    "block": Workload("block", 1, 1, 256 << 20, 1, 64),
    "small": Workload("small", 1, 1000, 16 << 10, 1, 64),
    "small-serial": Workload("small-serial", 1, 1000, 16 << 10, 1, 64, one_by_one=True),
    "quick-layers": Workload("quick-layers", 2, 64, 4096, 4, 64 << 10, prefill_s=0.3),
    "quick": Workload("quick", 4, 128, 73_728, 8, 2 << 20),
}
"""hybrid: a 32K-token request of a model with 16 MLA layers and 48 linear-attention states, 705 MB. hybrid-layers: the
same while it is computed, in the time that a link of 1 Gbit/s needs for it. dense: 1.6 GB. small: 1,000 pages of
16 KiB, all handed over at once; small-serial: one after another. quick: a hybrid of 55 MB. quick-layers: a small one,
while it is computed."""


def fill(flat: Bytes, seed: int) -> None:
    """Random bytes, all of them: two pages are never equal."""
    words = len(flat) // 8
    rng = np.random.default_rng(seed)
    step = 1 << 20
    for first in range(0, words, step):
        last = min(words, first + step)
        flat[first * 8 : last * 8] = rng.integers(0, 1 << 64, last - first, dtype=np.uint64).view(np.uint8)


class Memory:
    """A rank's memory of a workload, in the first `total_bytes` of `flat`."""

    def __init__(self, workload: Workload, flat: Bytes) -> None:
        self.workload = workload
        self.flat = flat[: workload.total_bytes]
        kv_bytes = workload.pages * workload.page_bytes
        self.kv = [
            flat[layer * kv_bytes :][:kv_bytes].reshape(workload.pages, workload.page_bytes)
            for layer in range(workload.layers)
        ]
        states = flat[workload.layers * kv_bytes :]
        size = workload.state_bytes
        self.states = [states[i * size : (i + 1) * size].reshape(1, size) for i in range(workload.states)]
        self.rank = RankMemory(
            [[HostBuffer(a.ctypes.data, a.nbytes, a.shape[1]) for a in part] for part in (self.kv, self.states)]
        )

    @classmethod
    def private(cls, workload: Workload, seed: int | None) -> Memory:
        """Memory of this process alone; `seed` None leaves zeros."""
        flat = np.zeros(workload.total_bytes, np.uint8)
        if seed is not None:
            fill(flat, seed)
        return cls(workload, flat)

    def slots(self, seed: int) -> list[npt.NDArray[np.int64]]:
        """Where a request's items lie: pages in random order."""
        order = np.random.default_rng(seed).permutation(self.workload.pages).astype(np.int64)
        return [order, np.zeros(1, np.int64)]

    def items(self, seed: int) -> Iterator[memoryview]:
        """A request's items one by one, in an order that both ends share."""
        pages = self.slots(seed)[0]
        for buffer in self.kv:
            for page in pages:
                yield buffer[page].data
        for state in self.states:
            yield state[0].data

    def places(self, seed: int) -> tuple[list[int], list[int]]:
        """Addresses and lengths of `items`."""
        base = self.flat.ctypes.data
        offsets, lengths = extents(self.workload, seed)
        return (offsets + base).tolist(), lengths.tolist()

    def clear(self) -> None:
        self.flat[:] = 0


def extents(workload: Workload, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Offsets and lengths of a request's items in its memory, in the order that both ends share."""
    pages = np.random.default_rng(seed).permutation(workload.pages).astype(np.int64)
    kv_bytes = workload.pages * workload.page_bytes
    kv = (np.arange(workload.layers)[:, None] * kv_bytes + pages[None, :] * workload.page_bytes).ravel()
    states = workload.layers * kv_bytes + np.arange(workload.states) * workload.state_bytes
    lengths = np.repeat([workload.page_bytes, workload.state_bytes], [len(kv), len(states)])
    return np.concatenate([kv, states]), lengths


def digest(memory: Memory, seed: int) -> int:
    """Of a request's items, in order."""
    state = xxhash.xxh3_64()
    for item in memory.items(seed):
        state.update(item)
    result: int = state.intdigest()
    return result
