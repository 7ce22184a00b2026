"""One site of prefill servers on a trace: which blocks are cached where they are needed, and what TTFT that gives."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import ceil
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.core.request import RequestView
from sglang_prfaas.core.units import gbps_to_bytes_per_s
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.affinity import best_serving
from sglang_prfaas.scheduler.short_term import decide
from sglang_prfaas.scheduler.types import Observation, ServerView, SiteView
from sglang_prfaas.simulate.servers import PrefixCache
from sglang_prfaas.simulate.workload import BLOCK_TOKENS, Arrival

KV = paper.PAPER_PROFILE.kv
BLOCK_BYTES = BLOCK_TOKENS * KV.full_bytes_per_token
STATE_BLOCKS = ceil(KV.state_bytes / BLOCK_BYTES)
"""What the recurrent state at the end of a prompt takes, in blocks."""
UNBOUNDED = float("inf")

Routing = Literal["blind", "aware"]


class Layout(Struct, frozen=True, kw_only=True):
    """Where a site keeps prefixes. own_gb: what each server keeps for itself. store_gb: what each gives to a store that
    all of them read. store_gbps: at which a server reads that store."""

    own_gb: float = 0.0
    store_gb: float = 0.0
    store_gbps: float = 100.0

    @property
    def label(self) -> str:
        parts = [f"{name} {_size(gb)}" for name, gb in (("own", self.own_gb), ("store", self.store_gb)) if gb]
        return " + ".join(parts)


class Outcome(Struct, frozen=True, kw_only=True):
    """One run. store_share: of the hits, the blocks that were read from the store."""

    servers: int
    layout: Layout
    routing: Routing
    block_hit_rate: float
    store_share: float
    mean_ttft_s: float
    p90_ttft_s: float
    utilisation: float


class StatefulCache(PrefixCache):
    """A cache in which the state at the end of every prompt takes its room too."""

    def __init__(self, capacity_gb: float) -> None:
        super().__init__(1 << 40 if capacity_gb == UNBOUNDED else int(capacity_gb * 1e9 / BLOCK_BYTES))

    def insert(self, arrival: Arrival) -> None:
        if arrival.blocks:
            first = -1 - arrival.blocks[-1] * STATE_BLOCKS
            state = tuple(range(first, first - STATE_BLOCKS, -1))
            super().insert(msgspec.structs.replace(arrival, blocks=arrival.blocks + state))


def play(arrivals: Sequence[Arrival], servers: int, layout: Layout, routing: Routing) -> Outcome:
    """Replay a trace. TTFT is wait + read from the store + T_prefill(tokens left to compute)."""
    views = [ServerView("home", f"p{number}", "prefill", alive=True) for number in range(servers)]
    site = SiteView("home", "pd", [*views, ServerView("home", "d", "decode", alive=True)])
    observation = Observation([site], t_tokens=1 << 40)
    curve = paper.PAPER_PROFILE.prefill["H20"].time_s
    store = StatefulCache(layout.store_gb * servers)
    caches = {view.name: StatefulCache(layout.own_gb) for view in views}
    free_at = dict.fromkeys(caches, 0.0)
    ends: list[tuple[float, int, str]] = []
    ttfts, busy_s, hit_blocks, read_blocks, blocks = [], 0.0, 0, 0, 0
    for number, arrival in enumerate(arrivals):
        while ends and ends[0][0] <= arrival.at_s:
            _, done, name = heapq.heappop(ends)
            caches[name].insert(arrivals[done])
            store.insert(arrivals[done])
        for view in views:
            view.wait_s = max(0.0, free_at[view.name] - arrival.at_s)
        held = {name: cache.cached_tokens(arrival) for name, cache in caches.items()}
        stored = store.cached_tokens(arrival)
        if routing == "aware":
            site.cached_tokens = stored
            site.affinity = {name: tokens for name, tokens in held.items() if tokens > stored}
        best_serving(site, arrival.input_tokens, min(view.wait_s for view in views), curve.at)
        decision = decide(observation, RequestView(l_total=arrival.input_tokens))
        assert decision.prefill is not None
        chosen = decision.prefill
        chosen.served += 1
        usable = max(held[chosen.name], stored)
        read_tokens = usable - held[chosen.name]
        read_s = (read_tokens * KV.full_bytes_per_token + KV.state_bytes) / gbps_to_bytes_per_s(layout.store_gbps)
        work_s = curve.at(float(arrival.input_tokens - usable)) + (read_s if read_tokens else 0.0)
        ttfts.append(chosen.wait_s + work_s)
        free_at[chosen.name] = arrival.at_s + ttfts[-1]
        heapq.heappush(ends, (free_at[chosen.name], number, chosen.name))
        busy_s += work_s
        blocks += len(arrival.blocks)
        hit_blocks += blocks_of(usable, arrival)
        read_blocks += blocks_of(usable, arrival) - blocks_of(held[chosen.name], arrival)
    duration_s = max(max(free_at.values()), arrivals[-1].at_s)
    return Outcome(
        servers=servers,
        layout=layout,
        routing=routing,
        block_hit_rate=hit_blocks / max(1, blocks),
        store_share=read_blocks / max(1, hit_blocks),
        mean_ttft_s=float(np.mean(ttfts)),
        p90_ttft_s=float(np.quantile(ttfts, 0.9)),
        utilisation=busy_s / (servers * duration_s),
    )


def blocks_of(tokens: int, arrival: Arrival) -> int:
    """Blocks of a cached prefix of so many tokens; the prompt's last token is always computed."""
    return min(-(-tokens // BLOCK_TOKENS), len(arrival.blocks))


def ideal_hit_rate(arrivals: Sequence[Arrival]) -> float:
    """Share of blocks that some request before had, if every prompt were cached for good the moment it arrives."""
    cache = PrefixCache(1 << 40)
    hits = blocks = 0
    for arrival in arrivals:
        hits += blocks_of(cache.cached_tokens(arrival), arrival)
        blocks += len(arrival.blocks)
        cache.insert(arrival)
    return hits / max(1, blocks)


def _size(gb: float) -> str:
    return "unbounded" if gb == UNBOUNDED else f"{gb:g} GB"
