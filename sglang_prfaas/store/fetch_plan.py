"""Which objects of a prefix to ask a peer for, which to fetch, and what a fetch makes usable. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sglang_prfaas.store.hits import Hit, Need

Object = tuple[str, str]
"""Component and key."""
Groups = tuple[tuple[str, tuple[str, ...]], ...]
"""(namespace, keys) each."""


def groups_of(items: Sequence[Object], namespaces: Mapping[str, str]) -> Groups:
    """As they are asked for: by component, in the order in which components come first."""
    return tuple(
        (namespaces[component], tuple(key for _, key in _of(items, component)))
        for component in dict.fromkeys(component for component, _ in items)
    )


def _of(items: Sequence[Object], component: str) -> list[Object]:
    return [item for item in items if item[0] == component]


def ordered(items: Sequence[Object]) -> list[Object]:
    """As `groups_of` has them."""
    return [item for component in dict.fromkeys(c for c, _ in items) for item in _of(items, component)]


def wanted(
    keys: Sequence[str], needs: Sequence[Need], local: Hit, contains: Callable[[str, str], bool]
) -> list[Object]:
    """What could make the hit longer. States first, as they are few."""
    found: list[Object] = []
    for need in needs:
        candidates = need.keys if need.policy == "block_groups" else keys
        found += [(need.component, key) for key in candidates if not contains(need.component, key)]
    return found + [("kv", key) for key in keys[local.found.get("kv", 0) :] if not contains("kv", key)]


def parts(keys: Sequence[str], needs: Sequence[Need], pages: int) -> list[Object]:
    """Everything that a prefix of so many pages consists of, states first."""
    found: list[Object] = []
    for need in needs:
        if need.policy == "trailing_pages":
            own: Sequence[str] = keys[max(0, pages - max(1, need.trailing)) : pages]
        elif need.policy == "all_pages":
            own = keys[:pages]
        else:
            own = need.keys[: -(-pages // need.block_pages) * need.group_pages] if need.block_pages else ()
        found += [(need.component, key) for key in own]
    return found + [("kv", key) for key in keys[:pages]]


def joined(local: Hit, hit: Hit, needs: Sequence[Need]) -> Hit:
    """What can be used now and when the fetch is done: between both lengths, states are not fetched."""
    exact = any(need.policy == "trailing_pages" for need in needs)
    usable = (*local.usable, hit.pages) if exact else hit.usable
    reach = {name: max(min(pages, hit.pages), local.found.get(name, 0)) for name, pages in hit.found.items()}
    return Hit(pages=hit.pages, usable=usable, found=reach)
