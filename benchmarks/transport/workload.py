"""What is moved: the shapes of requests, as buffers full of random bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from sglang_prfaas.transport.layout import Component, Layout
from sglang_prfaas.transport.memory import HostBuffer, RankMemory

Bytes = npt.NDArray[np.uint8]


class Workload(Struct, frozen=True):
    """`pages` scattered pages of `page_bytes` in each of `layers` buffers, and `states` items of `state_bytes`.

    one_by_one: each page is handed over when the one before is acknowledged."""

    name: str
    layers: int
    pages: int
    page_bytes: int
    states: int
    state_bytes: int
    one_by_one: bool = False

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


WORKLOADS = {
    "hybrid": Workload("hybrid", 16, 512, 73_728, 48, 2 << 20),
    "dense": Workload("dense", 48, 512, 64 << 10, 1, 64),
    "block": Workload("block", 1, 1, 256 << 20, 1, 64),
    "small": Workload("small", 1, 1000, 16 << 10, 1, 64),
    "small-serial": Workload("small-serial", 1, 1000, 16 << 10, 1, 64, one_by_one=True),
    "quick": Workload("quick", 4, 128, 73_728, 8, 2 << 20),
}
"""hybrid: a 32K-token request of a model with 16 MLA layers and 48 linear-attention states, 705 MB. dense: 1.6 GB.
small: 1,000 pages of 16 KiB, all handed over at once; small-serial: one after another."""


class Memory:
    """A rank's memory of a workload; `seed` None leaves zeros. Every page is touched once before it is measured."""

    def __init__(self, workload: Workload, seed: int | None) -> None:
        self.workload = workload
        rng = np.random.default_rng(seed)

        def buffer(items: int, item_bytes: int) -> Bytes:
            array = np.empty((items, item_bytes), np.uint8)
            array[:] = 0 if seed is None else rng.integers(0, 256, item_bytes, dtype=np.uint8)
            if seed is not None:
                array[:, :8] = rng.integers(0, 256, (items, 8), dtype=np.uint8)
            return array

        self.kv = [buffer(workload.pages, workload.page_bytes) for _ in range(workload.layers)]
        self.states = [buffer(1, workload.state_bytes) for _ in range(workload.states)]
        self.rank = RankMemory(
            [[HostBuffer(a.ctypes.data, a.nbytes, a.shape[1]) for a in part] for part in (self.kv, self.states)]
        )

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

    def clear(self) -> None:
        for array in [*self.kv, *self.states]:
            array[:] = 0
