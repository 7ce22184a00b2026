"""Who has the blocks of a pool: prefixes, transfers, or nobody; and who may have more.

Each side has a floor, a number of blocks that the other can never take from it. Between the floors it is first come,
first served. Source: PrfaaS section 3.2 (prefix-cache and transfer-cache blocks).
"""

from __future__ import annotations

from sglang_prfaas.errors import ConfigError, PoolFullError

Blocks = tuple[int, ...]


class BlockLedger:
    """Blocks 0 to `total_blocks` - 1, each free or of one category. Raises ConfigError for floors beyond the total."""

    def __init__(self, total_blocks: int, *, prefix_floor_blocks: int, transfer_floor_blocks: int) -> None:
        if min(prefix_floor_blocks, transfer_floor_blocks) < 0 or total_blocks < 1:
            raise ConfigError("a pool needs at least one block, and floors of at least 0")
        if prefix_floor_blocks + transfer_floor_blocks > total_blocks:
            raise ConfigError(
                f"the floors of {prefix_floor_blocks} blocks for prefixes and {transfer_floor_blocks} for transfers "
                f"are more than the pool's {total_blocks}: lower one"
            )
        self.total_blocks = total_blocks
        self.prefix_limit_blocks = total_blocks - transfer_floor_blocks
        self.transfer_limit_blocks = total_blocks - prefix_floor_blocks
        self.prefix_blocks = 0
        self.transfer_blocks = 0
        self._free = list(range(total_blocks))[::-1]

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def to_evict_for_prefix(self, blocks: int) -> int:
        """Prefix blocks that must go before `blocks` more can come."""
        return max(0, blocks - self.free_blocks, self.prefix_blocks + blocks - self.prefix_limit_blocks)

    def to_evict_for_transfer(self, blocks: int) -> int:
        """Prefix blocks that must go before a transfer can have `blocks`. Raises PoolFullError where that would take
        prefixes below their floor."""
        if self.transfer_blocks + blocks > self.transfer_limit_blocks:
            raise PoolFullError(
                f"a transfer of {blocks} blocks: {self.transfer_blocks} of at most {self.transfer_limit_blocks} are "
                "taken"
            )
        return max(0, blocks - self.free_blocks)

    def take_prefix(self, blocks: int) -> Blocks:
        self.prefix_blocks += blocks
        return self._take(blocks)

    def take_transfer(self, blocks: int) -> Blocks:
        self.transfer_blocks += blocks
        return self._take(blocks)

    def give_back_prefix(self, blocks: Blocks) -> None:
        self.prefix_blocks -= len(blocks)
        self._free.extend(blocks)

    def give_back_transfer(self, blocks: Blocks) -> None:
        self.transfer_blocks -= len(blocks)
        self._free.extend(blocks)

    def _take(self, blocks: int) -> Blocks:
        taken = tuple(self._free[len(self._free) - blocks :])
        del self._free[len(self._free) - blocks :]
        return taken
