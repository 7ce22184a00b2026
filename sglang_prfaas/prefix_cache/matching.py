"""The longest prefix that each holder has, found for all holders in one walk over the blocks of a prompt."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from msgspec import Struct

from sglang_prfaas.prefix_cache.block_table import SetNumbers
from sglang_prfaas.prefix_cache.holder_sets import HolderSets, holders_in


class Holder(Struct, frozen=True, order=True):
    """One cache: a server of a site, or one data-parallel rank of it."""

    site: str
    server: str
    dp_rank: int = 0


class PrefixMatch(Struct, frozen=True):
    """How many blocks, from the prompt's first on, a holder has without a gap."""

    device_blocks: int = 0  # on the device alone
    host_blocks: int = 0  # on device or host
    disk_blocks: int = 0  # on any tier
    state_blocks: int = 0  # at the end of these is the deepest state checkpoint within disk_blocks

    def usable_blocks(self, hybrid: bool) -> int:
        """What a request could skip: for a hybrid model, a prefix of exactly the length of a state checkpoint."""
        return self.state_blocks if hybrid else self.disk_blocks


class Match(Struct, frozen=True):
    """What the holders have of one prompt; holders without its first block are left out."""

    by_holder: dict[Holder, PrefixMatch]
    block_tokens: int

    def cached_tokens(self, holder: Holder, hybrid: bool) -> int:
        """Tokens of the prompt's prefix that a holder has ready for use."""
        match = self.by_holder.get(holder)
        return match.usable_blocks(hybrid) * self.block_tokens if match else 0


class PrefixWalk:
    """Goes through a prompt's blocks in order; runs of blocks with the same holders count as one step."""

    def __init__(self, sets: HolderSets, heads: int) -> None:
        self.alive = heads
        """Holders that have all blocks so far on some tier."""
        self._sets = sets
        self._on_device = self._on_host = heads
        self._device: dict[int, int] = {}  # blocks by slot, of the holders whose prefix has ended
        self._host: dict[int, int] = {}
        self._disk: dict[int, int] = {}
        self._states: list[tuple[int, int]] = []
        self._blocks = 0

    def take(self, numbers: SetNumbers) -> bool:
        """The set numbers of the next blocks; False once no holder is left."""
        if not len(numbers):
            return bool(self.alive)
        bounds = [0, *(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(numbers)]
        at = self._blocks
        for number, start, end in zip(numbers[bounds[:-1]].tolist(), bounds, bounds[1:], strict=False):
            reach = self._sets.reach(number)
            self._blocks = at + start
            if lost := self._on_device & ~reach.device:
                self._on_device = self._end(lost, self._on_device, self._device)
            if lost := self._on_host & ~reach.host:
                self._on_host = self._end(lost, self._on_host, self._host)
            if lost := self.alive & ~reach.disk:
                self.alive = self._end(lost, self.alive, self._disk)
                if not self.alive:
                    return False
            self._blocks = at + end
            if states := reach.state & self.alive:
                self._states.append((self._blocks, states))
        return True

    def result(self, holders: Mapping[int, Holder], block_tokens: int) -> Match:
        """The match, for the holders of these slots."""
        self._end(self._on_device, 0, self._device)
        self._end(self._on_host, 0, self._host)
        self._end(self.alive, 0, self._disk)
        deepest: dict[int, int] = {}
        seen = 0
        for blocks, states in reversed(self._states):
            for slot in holders_in(states & ~seen):
                deepest[slot] = blocks
            seen |= states
        return Match(
            {
                holders[slot]: PrefixMatch(
                    self._device.get(slot, 0), self._host.get(slot, 0), blocks, deepest.get(slot, 0)
                )
                for slot, blocks in self._disk.items()
                if slot in holders
            },
            block_tokens,
        )

    def _end(self, lost: int, alive: int, lengths: dict[int, int]) -> int:
        if self._blocks:
            for slot in holders_in(lost):
                lengths[slot] = self._blocks
        return alive & ~lost
