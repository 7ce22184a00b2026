"""Objects of other sites between their arrival and their place in the tiers: on the heap, or in blocks of the pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from sglang_prfaas.prefix_cache.ledger import Blocks


class Room(Protocol):
    """Memory of one fetch. Not thread-safe: whoever uses it keeps others out."""

    def put(self, name: str, payload: memoryview) -> None:
        """Keep what has come. `payload` may not be changed afterwards."""

    def names(self) -> Sequence[str]: ...

    def size(self, name: str) -> int:
        """Bytes of an object, -1 where it has not come."""

    def copy(self, name: str, out: memoryview) -> None:
        """Copy an object that has come to `out`, of exactly its length."""

    def whole(self, name: str) -> memoryview:
        """An object that has come, not to be changed."""

    def close(self) -> None:
        """What came is not needed any more."""


OpenRoom = Callable[[Sequence[int]], Room | None]
"""Memory for objects of these sizes; None where there is none to be had now."""


class HeapRoom:
    """Memory of the process."""

    def __init__(self) -> None:
        self._payloads: dict[str, memoryview] = {}

    def put(self, name: str, payload: memoryview) -> None:
        self._payloads[name] = payload

    def names(self) -> Sequence[str]:
        return tuple(self._payloads)

    def size(self, name: str) -> int:
        payload = self._payloads.get(name)
        return len(payload) if payload is not None else -1

    def copy(self, name: str, out: memoryview) -> None:
        out[:] = self._payloads[name]

    def whole(self, name: str) -> memoryview:
        return self._payloads[name]

    def close(self) -> None:
        self._payloads = {}


def on_the_heap(sizes: Sequence[int]) -> Room:
    """An `OpenRoom` that always has room: the limit of fetches under way is all that bounds it."""
    return HeapRoom()


class BlockMemory(Protocol):
    """What `PoolRoom` needs of the host tier."""

    def blocks_for(self, nbytes: int) -> int: ...

    def copy(self, blocks: Blocks, data: memoryview, *, to_arena: bool) -> None: ...


class PoolRoom:
    """Transfer-cache blocks of the pool: those of every object in the order in which they come."""

    def __init__(self, memory: BlockMemory, blocks: Blocks, give_back: Callable[[], None]) -> None:
        self._memory, self._free, self._give_back = memory, blocks, give_back
        self._held: dict[str, tuple[Blocks, int]] = {}

    def put(self, name: str, payload: memoryview) -> None:
        count = self._memory.blocks_for(len(payload))
        blocks, self._free = self._free[:count], self._free[count:]
        self._memory.copy(blocks, payload, to_arena=True)
        self._held[name] = blocks, len(payload)

    def names(self) -> Sequence[str]:
        return tuple(self._held)

    def size(self, name: str) -> int:
        return self._held[name][1] if name in self._held else -1

    def copy(self, name: str, out: memoryview) -> None:
        self._memory.copy(self._held[name][0], out, to_arena=False)

    def whole(self, name: str) -> memoryview:
        found = memoryview(bytearray(self.size(name)))
        self.copy(name, found)
        return found

    def close(self) -> None:
        self._held = {}
        self._give_back()
