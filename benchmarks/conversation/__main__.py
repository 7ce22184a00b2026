"""What prefix caches and cache-aware routing give on a trace.

    python -m benchmarks.conversation TRACE --json OUT

The prefill servers of one site, each with a cache of its own, least recently used blocks leaving first. Every request
is placed by the production scheduler (`best_serving`, `decide`): blind to caches, aware of what every server holds, and
with one cache that all servers read. TTFT is wait + T_prefill(tokens left to compute); decode and links are left out.
The index is taken to be up to date.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec import Struct

from sglang_prfaas.core.request import RequestView
from sglang_prfaas.launch.tables import table, write_json
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.affinity import best_serving
from sglang_prfaas.scheduler.short_term import decide
from sglang_prfaas.scheduler.types import Observation, ServerView, SiteView
from sglang_prfaas.simulate.servers import PrefixCache
from sglang_prfaas.simulate.workload import BLOCK_TOKENS, Arrival, load_trace, spread, time_scaled

UNBOUNDED = 1 << 40
TRACE_STEP_S = 3.0

Routing = Literal["blind", "aware", "shared"]
ROUTINGS: tuple[Routing, ...] = ("blind", "aware", "shared")


class Outcome(Struct, frozen=True, kw_only=True):
    """One run. pool_gb: of each server, for the full-attention blocks; None: unbounded. routing: blind, aware, or
    shared: one cache of that size for the whole site, as a store that all servers read."""

    servers: int
    pool_gb: float | None
    routing: Routing
    block_hit_rate: float
    mean_ttft_s: float
    p90_ttft_s: float
    utilisation: float


def play(
    arrivals: Sequence[Arrival], servers: int, pool_blocks: int, routing: Routing, pool_gb: float | None = None
) -> Outcome:
    """Replay a trace."""
    views = [ServerView("home", f"p{number}", "prefill", alive=True) for number in range(servers)]
    site = SiteView("home", "pd", [*views, ServerView("home", "d", "decode", alive=True)])
    observation = Observation([site], t_tokens=1 << 40)
    curve = paper.PAPER_PROFILE.prefill["H20"].time_s
    shared = PrefixCache(pool_blocks)
    caches = {view.name: shared if routing == "shared" else PrefixCache(pool_blocks) for view in views}
    free_at = dict.fromkeys(caches, 0.0)
    ends: list[tuple[float, int, str]] = []
    ttfts, busy_s, hit_blocks, blocks = [], 0.0, 0, 0
    for number, arrival in enumerate(arrivals):
        while ends and ends[0][0] <= arrival.at_s:
            _, done, name = heapq.heappop(ends)
            caches[name].insert(arrivals[done])
        for view in views:
            view.wait_s = max(0.0, free_at[view.name] - arrival.at_s)
        if routing == "shared":
            held = dict.fromkeys(caches, shared.cached_tokens(arrival))
        else:
            held = {name: cache.cached_tokens(arrival) for name, cache in caches.items()}
        site.affinity = {name: tokens for name, tokens in held.items() if tokens} if routing == "aware" else {}
        best_serving(site, arrival.input_tokens, min(view.wait_s for view in views), curve.at)
        decision = decide(observation, RequestView(l_total=arrival.input_tokens))
        assert decision.prefill is not None
        chosen = decision.prefill
        chosen.served += 1
        work_s = curve.at(float(arrival.input_tokens - held[chosen.name]))
        ttfts.append(chosen.wait_s + work_s)
        free_at[chosen.name] = arrival.at_s + ttfts[-1]
        heapq.heappush(ends, (free_at[chosen.name], number, chosen.name))
        busy_s += work_s
        blocks += len(arrival.blocks)
        hit_blocks += min(-(-held[chosen.name] // BLOCK_TOKENS), len(arrival.blocks))
    duration_s = max(max(free_at.values()), arrivals[-1].at_s)
    return Outcome(
        servers=servers,
        pool_gb=pool_gb,
        routing=routing,
        block_hit_rate=hit_blocks / max(1, blocks),
        mean_ttft_s=float(np.mean(ttfts)),
        p90_ttft_s=float(np.quantile(ttfts, 0.9)),
        utilisation=busy_s / (servers * duration_s),
    )


def ideal_hit_rate(arrivals: Sequence[Arrival]) -> float:
    """Share of blocks that some request before had, if every prompt were cached for good the moment it arrives."""
    cache = PrefixCache(UNBOUNDED)
    hits = blocks = 0
    for arrival in arrivals:
        hits += min(-(-cache.cached_tokens(arrival) // BLOCK_TOKENS), len(arrival.blocks))
        blocks += len(arrival.blocks)
        cache.insert(arrival)
    return hits / max(1, blocks)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.conversation", description=__doc__)
    parser.add_argument("trace", help="JSON lines in the Mooncake format, with hash_ids")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--servers", type=int, nargs="+", default=[8])
    parser.add_argument("--pool-gb", type=float, nargs="+", default=[64, 256, 1024], help="of each server")
    parser.add_argument("--rate", type=float, default=0.0, help="times the trace's rate; 0: blind is 80 %% busy")
    args = parser.parse_args()
    trace = spread(load_trace(args.trace), TRACE_STEP_S)
    block_bytes = BLOCK_TOKENS * paper.PAPER_PROFILE.kv.full_bytes_per_token
    runs = []
    for servers in args.servers:
        rate = args.rate
        if not rate:
            slow = play(time_scaled(trace, 0.01), servers, UNBOUNDED, "blind")
            rate = 0.01 * 0.8 / slow.utilisation
        arrivals = time_scaled(trace, rate)
        for pool_gb in (*args.pool_gb, None):
            for routing in ROUTINGS:
                pool = UNBOUNDED if pool_gb is None else int(pool_gb * 1e9 / block_bytes)
                runs.append(play(arrivals, servers, pool, routing, pool_gb))
    rows = [
        [
            f"{run.servers} servers",
            "unbounded" if run.pool_gb is None else f"{run.pool_gb:g}",
            run.routing,
            f"{run.block_hit_rate:.1%}",
            f"{run.mean_ttft_s:.2f}",
            f"{run.p90_ttft_s:.2f}",
            f"{run.utilisation:.0%}",
        ]
        for run in runs
    ]
    print(table(["site", "pool, GB each", "routing", "block hits", "mean TTFT, s", "p90, s", "busy"], rows))
    ideal = ideal_hit_rate(trace)
    print(f"ideal, every prompt cached for good as it arrives: {ideal:.1%}")
    if args.json:
        write_json(
            args.json,
            {"trace": args.trace, "requests": len(trace), "block_bytes": block_bytes, "ideal": ideal, "runs": runs},
        )


if __name__ == "__main__":
    main()
