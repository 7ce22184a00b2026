"""Which prefix of a prompt can be used, given which pages of which component exist. Pure.

Policies of SGLang 0.5.23 (`mem_cache/hicache_storage.py`, PoolHitPolicy): full attention needs every page; recurrent
and window state only the last ones of the prefix, but exactly those; block groups never limit the hit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from msgspec import Struct

Policy = Literal["all_pages", "trailing_pages", "block_groups"]


class Need(Struct, frozen=True, kw_only=True):
    """What one component beside KV needs. `trailing`: pages before the prefix's end (trailing_pages); `block_pages`
    and `group_pages`: KV pages that one block covers, and keys of one group (block_groups)."""

    component: str
    policy: Policy
    trailing: int = 1
    keys: Sequence[str] = ()
    block_pages: int = 0
    group_pages: int = 0


class Hit(Struct, frozen=True, kw_only=True):
    """`pages`: longest usable prefix; `usable`: all usable lengths, ascending; `found`: for each component the pages of
    its own longest one."""

    pages: int
    usable: tuple[int, ...]
    found: dict[str, int]


def best_hit(keys: Sequence[str], needs: Sequence[Need], contains: Callable[[str, str], bool], kv: str = "kv") -> Hit:
    """The longest prefix of `keys` that every component can serve. contains(component, key): whether a page exists."""
    pages = _leading(keys, lambda key: contains(kv, key))
    usable = list(range(1, pages + 1))
    found = {kv: pages}
    for need in needs:
        match need.policy:
            case "block_groups":
                found[need.component] = _group_pages(need, contains)
                continue
            case "all_pages":
                own = list(range(1, 1 + _leading(keys[:pages], lambda key: contains(need.component, key))))  # noqa: B023
            case "trailing_pages":
                own = _trailing(keys[:pages], max(1, need.trailing), need.component, contains)
        found[need.component] = own[-1] if own else 0
        allowed = set(own)
        usable = [length for length in usable if length in allowed]
    return Hit(pages=usable[-1] if usable else 0, usable=tuple(usable), found=found)


def _leading(keys: Sequence[str], there: Callable[[str], bool]) -> int:
    return next((index for index, key in enumerate(keys) if not there(key)), len(keys))


def _trailing(keys: Sequence[str], count: int, component: str, contains: Callable[[str, str], bool]) -> list[int]:
    """Lengths whose last `count` pages (all of them, in a shorter prefix) exist."""
    lengths, run = [], 0
    for length, key in enumerate(keys, 1):
        run = run + 1 if contains(component, key) else 0
        if run >= min(count, length):
            lengths.append(length)
    return lengths


def _group_pages(need: Need, contains: Callable[[str, str], bool]) -> int:
    if not (need.block_pages and need.group_pages):
        return 0
    there = _leading(need.keys, lambda key: contains(need.component, key))
    return there // need.group_pages * need.block_pages
