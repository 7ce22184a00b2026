"""How SGLang divides a model's caches among attention TP ranks. Needs no SGLang.

Sources: SGLang's `KVArgs`, and its own re-sharding of states (`state_dim_per_tensor`: length of the axis that is
divided, 0 for states that are the same on every rank; `state_slice_outer_counts`: rows before that axis;
`state_conv_shard_groups`: sections of a convolution state, each divided on its own).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from sglang_prfaas.transport.layout import Sharding
from sglang_prfaas.transport.paging import TOKEN_ROWS


def page_shardings(
    item_bytes: Sequence[int], page_tokens: int, kv_format: str, kv_heads: int, width: int
) -> tuple[Sharding, ...]:
    """Of buffers of pages: full attention, or a sliding window. kv_heads: of the whole model in these layers, 0 for
    MLA, whose latent every rank has. width: of attention TP. Empty where it cannot be told."""
    sizes = [int(size) for size in item_bytes]
    if not kv_heads:
        return (Sharding(len(sizes)),)
    if kv_format not in TOKEN_ROWS:
        return ()
    local = max(1, kv_heads // width)
    if any(size % (page_tokens * local) for size in sizes):
        return ()
    return _merged(Sharding(1, page_tokens, (kv_heads,), size // (page_tokens * local)) for size in sizes)


def state_shardings(kv_args: Any, component: int, width: int) -> tuple[Sharding, ...]:
    """Of a state component's buffers, at attention TP `width`. Empty where SGLang does not tell."""
    sizes = kv_args.state_item_lens[component]
    dims = kv_args.state_dim_per_tensor[component]
    rows = kv_args.state_slice_outer_counts[component]
    groups = kv_args.state_conv_shard_groups[component] or [None] * len(sizes)
    if not len(sizes) == len(dims) == len(rows) == len(groups):
        return ()
    found = []
    for size, dim, count, sections in zip(sizes, dims, rows, groups, strict=True):
        if not dim:
            found.append(Sharding(1))
            continue
        if size % (dim * count):
            return ()
        units = tuple(int(n) for n in sections or ())
        if sum(units) != dim * width:
            units = (dim * width,)
        found.append(Sharding(1, int(count), units, size // (dim * count)))
    return _merged(found)


def _merged(single: Iterable[Sharding]) -> tuple[Sharding, ...]:
    """Shardings of one buffer each, neighbours that are the same as one."""
    return tuple(
        Sharding(len(list(same)), sharding.rows, sharding.sections, sharding.unit_bytes)
        for sharding, same in itertools.groupby(single)
    )
