"""What prefix caches and cache-aware routing give on a trace.

    python -m benchmarks.conversation TRACE --json OUT

One site: prefill servers, each an H20 instance (a host of eight GPUs), with a cache of their own, or with a store that
all of them read and to which each lends the same (Mooncake Store), or both. Every request is placed by the production
scheduler (`best_serving`, `decide`). Least recently used blocks leave first; the recurrent state at the end of every
prompt takes its room. The difference to an unbounded ideal is split into what the load moves away from holders, and
what the size costs. Decode is left out, and the index is up to date.

Two sites: the case study's fleet in the production simulator, each site with one store.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.conversation.replay import (
    BLOCK_BYTES,
    UNBOUNDED,
    Layout,
    Outcome,
    Routing,
    ideal_hit_rate,
    play,
)
from benchmarks.conversation.two_sites import play_sites
from sglang_prfaas.launch.tables import table, write_json
from sglang_prfaas.simulate.workload import Arrival, load_trace, spread, time_scaled

TRACE_STEP_S = 3.0
IDLE = 0.05
"""Share of the rate at which there are hardly any queues."""
BAR_POINTS = 2.0
"""What a pool of a realistic size may be below the ideal."""
REALISTIC_GB = 128.0
"""Of a host: hosts of 8 H20 or H200 come with 1 to 2 TB of memory, of which this is 6 to 13 %."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conversation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("trace", help="JSON lines in the Mooncake format, with hash_ids")
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--pool-gb", type=float, nargs="+", default=[16, 32, 64, REALISTIC_GB], help="of each server")
    parser.add_argument("--rate", type=float, default=0.0, help="times the trace's rate; 0: blind is 80 %% busy")
    parser.add_argument("--store-gbps", type=float, default=100.0, help="at which a server reads the store")
    args = parser.parse_args()
    trace = spread(load_trace(args.trace), TRACE_STEP_S)
    everything = Layout(own_gb=UNBOUNDED)
    slow = play(time_scaled(trace, 0.01), args.servers, everything, "blind")
    arrivals = time_scaled(trace, args.rate or 0.01 * 0.8 / slow.utilisation)
    ideal = ideal_hit_rate(trace)

    def run(routing: Routing, own_gb: float = 0.0, store_gb: float = 0.0) -> Outcome:
        layout = Layout(own_gb=own_gb, store_gb=store_gb, store_gbps=args.store_gbps)
        return play(arrivals, args.servers, layout, routing)

    runs = []
    for gb in (*args.pool_gb, UNBOUNDED):
        runs += [run("blind", own_gb=gb), run("aware", own_gb=gb), run("aware", store_gb=gb)]
        runs += [run("aware", own_gb=gb / 4, store_gb=gb * 3 / 4)] if gb < UNBOUNDED else []
    idle = play(time_scaled(arrivals, IDLE), args.servers, everything, "aware")
    rows = [_row(each, ideal) for each in runs]
    print(f"{args.servers} servers of one site, {len(trace)} requests; sizes are of each server")
    print(table(["prefixes in", "routing", "block hits", "points", "mean TTFT, s", "p90, s", "busy"], rows))
    _print_gap(ideal, runs, idle)
    _print_bar(ideal, runs)
    sites = _two_sites(arrivals, args.servers)
    if args.json:
        write_json(
            args.json,
            {
                "trace": args.trace,
                "requests": len(trace),
                "block_bytes": BLOCK_BYTES,
                "ideal": ideal,
                "runs": runs,
                "idle": idle,
                "two_sites": sites,
            },
        )


def _row(run: Outcome, ideal: float) -> list[str]:
    return [
        run.layout.label,
        run.routing,
        f"{run.block_hit_rate:.1%}",
        f"{100 * (run.block_hit_rate - ideal):+.1f}",
        f"{run.mean_ttft_s:.2f}",
        f"{run.p90_ttft_s:.2f}",
        f"{run.utilisation:.0%}",
    ]


def _print_gap(ideal: float, runs: Sequence[Outcome], idle: Outcome) -> None:
    """Where caches of single servers lose against the ideal, in points of block hits."""
    own = [run for run in runs if run.routing == "aware" and not run.layout.store_gb]
    unbounded = own[-1].block_hit_rate
    print(f"ideal, every prompt cached for good as it arrives: {ideal:.1%}; below it, in points, with own caches:")
    print(f"  the load moves requests away from holders: {100 * (idle.block_hit_rate - unbounded):.1f}")
    print(f"  what is left of that at {IDLE:g} of the rate: {100 * (ideal - idle.block_hit_rate):.1f}")
    for run in own[:-1]:
        print(f"  size, {run.layout.own_gb:g} GB each: {100 * (unbounded - run.block_hit_rate):.1f}")


def _print_bar(ideal: float, runs: Sequence[Outcome]) -> None:
    fits = [run for run in runs if run.layout.store_gb and 100 * (ideal - run.block_hit_rate) <= BAR_POINTS]
    if not fits:
        print(f"no store is within {BAR_POINTS:g} points of the ideal: give more with --pool-gb")
        return
    least = fits[0]
    size = least.layout.own_gb + least.layout.store_gb
    blind = next(run for run in runs if run.routing == "blind" and run.layout.own_gb == size)
    gain = 1 - least.mean_ttft_s / blind.mean_ttft_s
    print(
        f"least within {BAR_POINTS:g} points: {least.layout.label} of each server, {least.block_hit_rate:.1%} of "
        f"blocks, mean TTFT {gain:.0%} below blind routing with caches of the same size"
    )


def _two_sites(arrivals: Sequence[Arrival], servers: int) -> list[object]:
    """Cross-site: the same requests, at the same rate, on a PrfaaS and a PD site."""
    found = [play_sites(arrivals, gb, fetch) for gb in (REALISTIC_GB * servers, UNBOUNDED) for fetch in (False, True)]
    rows = [
        [
            "unbounded" if run.store_gb == UNBOUNDED else f"{run.store_gb:g}",
            "fetched" if run.fetch else "apart",
            f"{run.block_hit_rate:.1%}",
            f"{run.offloaded_share:.0%}",
            f"{run.fetched_share:.1%}",
            f"{run.mean_ttft_s:.2f}",
            f"{run.p90_ttft_s:.2f}",
        ]
        for run in found
    ]
    print("\ntwo sites, 4 H200 and 8 H20 instances, live policy")
    print(table(["store of a site, GB", "prefixes", "block hits", "sent", "fetch", "mean TTFT, s", "p90, s"], rows))
    return [*found]


if __name__ == "__main__":
    main()
