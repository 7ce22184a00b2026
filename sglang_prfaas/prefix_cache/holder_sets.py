"""Sets of who holds a block, each kept once and known by a small number.

Millions of blocks share few sets: those that one server holds on its device, those that another has on host and device,
and so on. A set is one integer with six bits per holder: KV on device, host, disk; a recurrent state on device, host,
disk.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

BITS_PER_HOLDER = 6


class Tier(enum.IntEnum):
    """Where a holder has something, from near to far."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class Part(enum.IntEnum):
    """What a holder has at a block: the KV of its tokens, or the recurrent state after its last one."""

    KV = 0
    STATE = 1


def bit_of(holder: int, part: Part, tier: Tier) -> int:
    """The mask of one bit."""
    return 1 << (BITS_PER_HOLDER * holder + 3 * part + tier)


def field_of(holder: int) -> int:
    """The mask of all bits of a holder."""
    return ((1 << BITS_PER_HOLDER) - 1) << (BITS_PER_HOLDER * holder)


def holders_in(heads: int) -> Iterator[int]:
    """The holders whose first bit is set, of a mask that has no other bits."""
    while heads:
        low = heads & -heads
        yield (low.bit_length() - 1) // BITS_PER_HOLDER
        heads ^= low


class Reach:
    """A set seen as masks over the holders' first bits: who has KV near enough, who has a state."""

    __slots__ = ("device", "disk", "host", "state")

    def __init__(self, mask: int, heads: int) -> None:
        self.device = mask & heads
        self.host = self.device | (mask >> 1 & heads)
        self.disk = self.host | (mask >> 2 & heads)
        self.state = (mask >> 3 | mask >> 4 | mask >> 5) & heads


class HolderSets:
    """Numbers for sets, at most `limit` of them (number 0 is the empty set), counted by the blocks that use them."""

    def __init__(self, max_holders: int, limit: int = 1 << 16) -> None:
        self.heads = sum(bit_of(holder, Part.KV, Tier.DEVICE) for holder in range(max_holders))
        self._limit = min(limit, 1 << 16)  # the table keeps numbers in 16 bits
        self._masks: list[int] = [0]
        self._blocks: list[int] = [0]
        self._reach: list[Reach | None] = [Reach(0, 0)]
        self._number_of: dict[int, int] = {0: 0}
        self._free: list[int] = []

    def __len__(self) -> int:
        """Sets in use, the empty one not counted."""
        return len(self._number_of) - 1

    def mask(self, number: int) -> int:
        return self._masks[number]

    def reach(self, number: int) -> Reach:
        """The set's masks for matching, computed once."""
        reach = self._reach[number]
        if reach is None:
            reach = self._reach[number] = Reach(self._masks[number], self.heads)
        return reach

    def number(self, mask: int) -> int | None:
        """The number of a set, new where it has none yet. None: all numbers are in use."""
        number = self._number_of.get(mask)
        if number is not None:
            return number
        if self._free:
            number = self._free.pop()
            self._masks[number], self._reach[number] = mask, None
        elif len(self._masks) < self._limit:
            number = len(self._masks)
            self._masks.append(mask)
            self._blocks.append(0)
            self._reach.append(None)
        else:
            return None
        self._number_of[mask] = number
        return number

    def add_blocks(self, number: int, blocks: int) -> None:
        """Count `blocks` more (or fewer) that use a set; one that no block uses gives up its number."""
        if number == 0:
            return
        self._blocks[number] += blocks
        if self._blocks[number] == 0:
            del self._number_of[self._masks[number]]
            self._free.append(number)

    def counted(self) -> dict[int, int]:
        """Blocks by set number, of the sets in use."""
        return {number: self._blocks[number] for number in self._number_of.values() if number}
