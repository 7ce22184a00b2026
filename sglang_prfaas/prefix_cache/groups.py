"""Groups of layers that share one pool, and the block size that lets them.

A full-attention group keeps one entry per block of tokens; a linear or window group keeps one entry per request, at a
checkpoint: of fixed size, usable at exactly that length. All entries are made of pool blocks of one size, so a block
that one group gives up serves any other. Source: PrfaaS section 3.2.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from sglang_prfaas.errors import ConfigError

GroupKind = Literal["full", "linear", "window"]


class Group(Struct, frozen=True, kw_only=True):
    """Layers of one kind. `entry_bytes`: KV of `block_tokens` tokens over all its layers (full), or the state of one
    request over all its layers (linear, window)."""

    name: str
    kind: GroupKind
    entry_bytes: int


class PoolLayout(Struct, frozen=True, kw_only=True):
    """How a model's cache is cut into pool blocks. Raises ConfigError for groups that cannot share a pool."""

    block_bytes: int
    block_tokens: int
    groups: tuple[Group, ...]

    def __post_init__(self) -> None:
        problems = [
            f"group {group.name}: entry_bytes is {group.entry_bytes}, expected at least 1"
            for group in self.groups
            if group.entry_bytes < 1
        ]
        if self.block_bytes < 1 or self.block_tokens < 1:
            problems.append(f"block_bytes {self.block_bytes} and block_tokens {self.block_tokens} must be at least 1")
        if len({group.name for group in self.groups}) < len(self.groups):
            problems.append("two groups have the same name: give each its own")
        if not any(group.kind == "full" for group in self.groups):
            problems.append("no full-attention group: the pool follows prefixes by their blocks, add one")
        if problems:
            raise ConfigError(problems)

    @property
    def hybrid(self) -> bool:
        """Whether a prefix can be used only at a checkpoint."""
        return any(group.kind != "full" for group in self.groups)

    def blocks_of(self, group: Group) -> int:
        """Pool blocks of one entry."""
        return -(-group.entry_bytes // self.block_bytes)

    @property
    def kv_blocks(self) -> int:
        """Pool blocks that one block of tokens takes, over all full-attention groups."""
        return sum(self.blocks_of(group) for group in self.groups if group.kind == "full")

    @property
    def state_blocks(self) -> int:
        """Pool blocks that one checkpoint takes, over all linear and window groups."""
        return sum(self.blocks_of(group) for group in self.groups if group.kind != "full")

    def blocks_for_bytes(self, length_bytes: int) -> int:
        """Pool blocks for a transfer of any length."""
        return -(-length_bytes // self.block_bytes)

    def split(self, blocks: tuple[int, ...], *, state: bool) -> dict[str, tuple[int, ...]]:
        """An entry's pool blocks by group name, in the order of the groups."""
        shares, at = {}, 0
        for group in self.groups:
            if (group.kind != "full") == state:
                shares[group.name] = blocks[at : at + self.blocks_of(group)]
                at += self.blocks_of(group)
        return shares
