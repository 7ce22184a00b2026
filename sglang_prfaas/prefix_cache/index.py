"""The global index: which server of which site holds which prefix and which recurrent state, and on what tier.

It is fed with the changes that servers report, and asked with the block hashes of a prompt. What it says may be old or
wrong: that costs a longer prefill, never a wrong token, since every server looks its own cache up again. Source:
PrfaaS section 3.2 (global KVCache manager).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from msgspec import Struct

from sglang_prfaas.errors import PoolFullError
from sglang_prfaas.prefix_cache.block_hash import BlockHashes, PromptHashes
from sglang_prfaas.prefix_cache.block_table import BlockTable, SetNumbers
from sglang_prfaas.prefix_cache.changes import Change, Cleared, Stored
from sglang_prfaas.prefix_cache.holder_sets import HolderSets, Part, Tier, bit_of, field_of, holders_in
from sglang_prfaas.prefix_cache.matching import Holder, Match, PrefixWalk

_SWEEP_PLACES = 1 << 16
_EXPORT_PLACES = 1 << 14
_FIRST_STEP, _LAST_STEP = 64, 2048
_FEW = 32
"""Blocks up to which going one by one is faster than array operations."""


class HeldBlocks(Struct, frozen=True):
    """How many blocks a holder has, by tier, and how many state checkpoints on any."""

    device: int = 0
    host: int = 0
    disk: int = 0
    states: int = 0


class GlobalIndex:
    """Blocks of all holders in one table of at most `max_blocks` distinct blocks; not safe for several threads.

    Blocks that come when the table is full are left out and counted in `dropped_blocks`: a prefix then ends earlier
    than it really does. Entries of a holder that was cleared or forgotten stop to match at once; their places are
    freed little by little.
    """

    def __init__(self, max_blocks: int, max_holders: int = 256) -> None:
        self.max_holders = max_holders
        self.dropped_blocks = 0
        self._table = BlockTable(max_blocks)
        self._sets = HolderSets(max_holders)
        self._slots: dict[Holder, int] = {}
        self._holders: dict[int, Holder] = {}
        self._free_slots = list(range(max_holders))[::-1]
        self._sweeping = 0  # bits that the pass under way takes out
        self._waiting = 0  # bits for the next pass
        self._swept_places = 0

    @property
    def blocks(self) -> int:
        """Distinct blocks in the table, those of cleared holders included until they are swept."""
        return len(self._table)

    @property
    def max_blocks(self) -> int:
        """Distinct blocks that it takes at most."""
        return self._table.max_blocks

    @property
    def holder_sets(self) -> int:
        """Distinct sets of holders in use."""
        return len(self._sets)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the table, which are all but a few MB of the index."""
        return self._table.memory_bytes

    @property
    def holders(self) -> tuple[Holder, ...]:
        """All holders known."""
        return tuple(self._slots)

    def held(self) -> dict[Holder, HeldBlocks]:
        """What each holder has. Goes through all holder sets: for reports, not for every request."""
        counts = {holder: [0, 0, 0, 0] for holder in self._slots}
        for number, blocks in self._sets.counted().items():
            mask = self._sets.mask(number)
            state = self._sets.reach(number).state
            for tier in Tier:
                for slot in holders_in(mask >> tier & self._sets.heads):
                    if slot in self._holders:
                        counts[self._holders[slot]][tier] += blocks
            for slot in holders_in(state):
                if slot in self._holders:
                    counts[self._holders[slot]][3] += blocks
        return {holder: HeldBlocks(*numbers) for holder, numbers in counts.items()}

    def apply(self, holder: Holder, changes: Iterable[Change]) -> None:
        """Take in what happened to a holder's cache, in order. Raises PoolFullError for one holder too many."""
        if holder not in self._slots:
            self._take_slot(holder)
        for change in changes:
            if isinstance(change, Cleared):
                self._retire(holder)
                self._take_slot(holder)
                continue
            bit = bit_of(self._slots[holder], change.part, change.tier)
            if isinstance(change, Stored):
                self._change(change.hashes, bit, 0)
            else:
                state = bit_of(self._slots[holder], Part.STATE, change.tier)
                self._change(change.hashes, 0, bit | state)
        if self._sweeping:
            self.sweep(_SWEEP_PLACES)

    def forget(self, holder: Holder) -> None:
        """Drop a holder and all it had; unknown holders are fine."""
        if holder in self._slots:
            self._retire(holder)

    def match(self, prompt: PromptHashes) -> Match:
        """How much of a prompt each holder has. Hashes no more of the prompt than it needs to."""
        walk = PrefixWalk(self._sets, self._live_heads())
        step, done = _FIRST_STEP, 0
        while done < len(prompt) and walk.alive:
            numbers = self._table.numbers(prompt.upto(done + step)[done:])
            if not walk.take(numbers):
                break
            done += len(numbers)
            step = min(2 * step, _LAST_STEP)
        return walk.result(self._holders, prompt.block_tokens)

    def export(self, start_place: int, max_blocks: int) -> tuple[list[tuple[Holder, Stored]], int]:
        """What the holders have, from a place of the table on, as changes that build it again; and the place to go on
        from, -1 at the end. About `max_blocks` blocks at a time.

        Blocks keep their places, so every block that is there from the first call to the last is told once.
        """
        changes: list[tuple[Holder, Stored]] = []
        blocks, start = 0, start_place
        while start < self._table.places and blocks < max_blocks:
            stop = min(start + max(_EXPORT_PLACES, max_blocks), self._table.places)
            places, numbers = self._table.used_in(start, stop)
            for number in _distinct(numbers):
                mask = self._sets.mask(number)
                hashes = self._table.hashes_at(places[numbers == number])
                for slot, holder in self._holders.items():
                    changes += [
                        (holder, Stored(hashes, tier, part))
                        for part in Part
                        for tier in Tier
                        if mask & bit_of(slot, part, tier)
                    ]
            blocks += len(places)
            start = stop
        return changes, start if start < self._table.places else -1

    def sweep(self, max_places: int) -> bool:
        """Go through up to `max_places` places of the table and take out cleared holders; True while there is more to
        do. `apply` does some of it each time."""
        if not self._sweeping:
            return False
        stop = min(self._swept_places + max_places, self._table.places)
        places, numbers = self._table.used_in(self._swept_places, stop)
        for number in _distinct(numbers):
            mask = self._sets.mask(number)
            if mask & self._sweeping:
                self._move(places[numbers == number], number, mask & ~self._sweeping)
        self._swept_places = stop
        if stop == self._table.places:
            self._free_slots.extend(slot for slot in range(self.max_holders) if self._sweeping & field_of(slot))
            self._sweeping, self._waiting, self._swept_places = self._waiting, 0, 0
        return bool(self._sweeping)

    def _change(self, hashes: BlockHashes, add: int, remove: int) -> None:
        if len(hashes) <= _FEW:
            remove |= self._sweeping | self._waiting
            for value in hashes.tolist():
                self._change_one(value, add, remove)
            return
        if len(hashes) > self._table.max_blocks - len(self._table):
            hashes = hashes[np.sort(np.unique(hashes, return_index=True)[1])]  # what is left out is the prefix's end
        else:
            hashes = np.unique(hashes)
        places = self._table.find(hashes)
        numbers = self._table.numbers_at(places)
        remove |= self._sweeping | self._waiting
        for number in _distinct(numbers):
            chosen = numbers == number
            if number:
                self._move(places[chosen], number, self._sets.mask(number) & ~remove | add)
            elif add:
                self._insert(hashes[chosen], add)

    def _change_one(self, value: int, add: int, remove: int) -> None:
        place = self._table.find_one(value)
        if place < 0:
            if add:
                number = self._sets.number(add)
                inserted = self._table.insert_one(-1 - place, value, number) if number is not None else 0
                if number is not None:
                    self._sets.add_blocks(number, inserted)
                self.dropped_blocks += 1 - inserted
            return
        number = self._table.number_at_one(place)
        before = self._sets.mask(number)
        mask = before & ~remove | add
        if mask == before:
            return
        target = self._sets.number(mask)
        if target is None:
            self.dropped_blocks += 1
            target = 0
        self._table.write_one(place, target)
        self._sets.add_blocks(target, 1)
        self._sets.add_blocks(number, -1)

    def _insert(self, hashes: BlockHashes, mask: int) -> None:
        number = self._sets.number(mask)
        inserted = 0
        if number is not None:
            inserted = self._table.insert(hashes, number)
            self._sets.add_blocks(number, inserted)
        self.dropped_blocks += len(hashes) - inserted

    def _move(self, places: np.ndarray[tuple[int], np.dtype[np.int64]], number: int, mask: int) -> None:
        """Give blocks of one set another one. Without a number for it they are dropped, which is safe for all sets."""
        if mask == self._sets.mask(number):
            return
        target = self._sets.number(mask)
        if target is None:
            self.dropped_blocks += len(places)
            target = 0
        self._table.write(places, target)
        self._sets.add_blocks(target, len(places))
        self._sets.add_blocks(number, -len(places))

    def _live_heads(self) -> int:
        return self._sets.heads & ~(self._sweeping | self._waiting)

    def _take_slot(self, holder: Holder) -> None:
        while not self._free_slots and self._sweeping:
            self.sweep(self._table.places)
        if not self._free_slots:
            raise PoolFullError(f"{holder} is one more than the {self.max_holders} holders the index was made for")
        slot = self._free_slots.pop()
        self._slots[holder], self._holders[slot] = slot, holder

    def _retire(self, holder: Holder) -> None:
        slot = self._slots.pop(holder)
        del self._holders[slot]
        if self._sweeping:
            self._waiting |= field_of(slot)
        else:
            self._sweeping, self._swept_places = field_of(slot), 0


def _distinct(numbers: SetNumbers) -> list[int]:
    """The distinct set numbers; mostly there is one."""
    if not len(numbers):
        return []
    if (numbers == numbers[0]).all():
        return [int(numbers[0])]
    if len(numbers) > 10_000:
        return [int(number) for number in np.flatnonzero(np.bincount(numbers))]
    return [int(number) for number in np.unique(numbers)]
