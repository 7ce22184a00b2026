"""`launch simulate`: policies compared on a virtual clock, with queues, transfers and faults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from sglang_prfaas.config.schema import RolesConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.launch import plan, plots
from sglang_prfaas.launch.tables import table, write_json
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.profiles import load_profile
from sglang_prfaas.scheduler.solver import solve
from sglang_prfaas.simulate.cluster import FAULT_KINDS, Fault, FaultKind, RoleChangeCost
from sglang_prfaas.simulate.link_trace import load_link_trace
from sglang_prfaas.simulate.result import Summary
from sglang_prfaas.simulate.scenario import POLICIES, Scenario, objective_s, run_policy
from sglang_prfaas.simulate.workload import Arrival, load_trace, poisson, spread, time_scaled, with_burst


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch simulate`."""
    parser.description = (
        "Simulate policies over the same requests: homogeneous (nothing offloaded, PD instances in the place of the\n"
        "PrfaaS ones), naive (all offloaded), static (one threshold), live (ours), shared (ours, one instance\n"
        "has both roles).\n"
        "The defaults are the paper's case study."
    )
    parser.add_argument("--policies", default="homogeneous,naive,static,live,shared", help="which, with commas")
    parser.add_argument("--rate", type=float, default=1.8, help="Poisson arrivals a second")
    parser.add_argument("--duration", type=float, default=3600.0, metavar="S", help="seconds of arrivals")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths")
    parser.add_argument("--trace", metavar="FILE", help="requests from a Mooncake trace instead")
    parser.add_argument("--time-scale", type=float, default=1.0, help="speed at which a trace is played")
    parser.add_argument("--threshold", type=float, metavar="T", help="t of the static policy (default: solved)")
    parser.add_argument("--cache-blocks", type=int, default=200_000, help="prefix cache of a site, 512-token blocks")
    parser.add_argument(
        "--ttft-slo",
        type=float,
        metavar="S",
        help="ours: seconds within which requests should have their first token; decides which waiting one is next "
        "(default: twice the P90 of prefill alone; 0: order of arrival)",
    )
    parser.add_argument("--fetch", action="store_true", help="ours: fetch prefixes that only the other site holds")
    parser.add_argument("--roles", action="store_true", help="live: change roles of PD servers as traffic shifts")
    parser.add_argument("--switch-s", type=float, default=20.0, metavar="S", help="a role change after the drain")
    parser.add_argument("--n-p", type=int, metavar="N", help="prefill servers of the PD site (default: solved)")
    parser.add_argument("--link", action="append", default=[], metavar="S:GBPS", help="the link changes; repeat")
    parser.add_argument("--loss", action="append", default=[], metavar="S:SHARE", help="the link loses; repeat")
    parser.add_argument("--link-trace", metavar="FILE", help="the link over time: lines of seconds and Gbps")
    parser.add_argument("--kill", action="append", default=[], metavar="S:N", help="N PrfaaS servers die; repeat")
    parser.add_argument("--revive", action="append", default=[], metavar="S:N", help="N of them return; repeat")
    for role in ("prefill", "decode"):
        for action, verb in (("kill", "die"), ("revive", "return")):
            parser.add_argument(
                f"--{action}-{role}", action="append", default=[], metavar="S:N", help=f"N {role} servers of PD {verb}"
            )
    parser.add_argument("--burst", metavar="S:SECONDS:FACTOR", help="FACTOR times the arrivals for SECONDS")
    parser.add_argument("--link-gbps", type=float, default=paper.LINK_GBPS, help="egress of the PrfaaS site")
    parser.add_argument("--rtt-ms", type=float, default=20.0, help="round-trip time of the link")
    parser.add_argument("--profile", metavar="FILE", help="profile file, TOML or JSON (default: the paper's)")
    parser.add_argument("--prfaas-hardware", default="H200", metavar="NAME", help="prefill curve of the PrfaaS site")
    parser.add_argument("--pd-hardware", default="H20", metavar="NAME", help="curves of the PD site")
    parser.add_argument("--prfaas-gpus", type=int, default=32, metavar="N", help="GPUs of the PrfaaS site")
    parser.add_argument("--pd-gpus", type=int, default=64, metavar="N", help="GPUs of the PD site")
    plan.add_workload_arguments(parser)
    parser.add_argument("--json", metavar="OUT", help="write summaries and samples over time as JSON")
    parser.add_argument("--plot", metavar="DIR", help="write a PNG for each policy (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Simulate; returns the exit status."""
    names = [name for name in args.policies.split(",") if name]
    if unknown := [name for name in names if name not in POLICIES]:
        raise ConfigError(f"--policies: {', '.join(unknown)} unknown; there are {', '.join(POLICIES)}")
    workload = plan.workload_of(args)
    fleet = plan.fleet_of(args, load_profile(args.profile) if args.profile else paper.PAPER_PROFILE)
    best = solve(fleet, workload)
    scenario = Scenario(
        fleet=fleet,
        slo_tokens_per_s=args.slo,
        n_p=best.n_p if args.n_p is None else args.n_p,
        t_tokens=round(best.t_tokens if args.threshold is None else args.threshold),
        rtt_s=args.rtt_ms / 1e3,
        cache_blocks=args.cache_blocks,
        ttft_slo_s=objective_s(fleet, workload) if args.ttft_slo is None else args.ttft_slo,
        fetch_prefixes=args.fetch,
        role_limits=RolesConfig(enabled=True, switch_s=args.switch_s) if args.roles else None,
        role_cost=RoleChangeCost(switch_s=args.switch_s),
        faults=_faults(args),
    )
    arrivals = _arrivals(args)
    print(
        f"{len(arrivals)} requests in {arrivals[-1].at_s:.0f} s; N_p {scenario.n_p:g}, t {scenario.t_tokens}",
        flush=True,
    )
    summaries: dict[str, Summary] = {}
    over_time, changes = {}, {}
    for name in names:
        result = run_policy(scenario, name, arrivals, progress=_progress(name))
        summaries[name], over_time[name] = result.summary(), result.over_time()
        changes[name] = result.role_changes
        if args.plot:
            plots.over_time(Path(args.plot), name, over_time[name])
    print(table(_HEADER, [_row(name, summary) for name, summary in summaries.items()]))
    for name, done in changes.items():
        for change in done:
            end = "done" if change.succeeded else "back in its old role"
            print(f"{name}: {change.at_s:.0f} s, {change.server} to {change.role}, {end} at {change.done_s:.0f} s")
    if args.json:
        write_json(
            args.json,
            {"command": "simulate", "requests": len(arrivals), "t_static": scenario.t_tokens, "n_p": scenario.n_p,
             "policies": summaries, "role_changes": changes, "over_time": over_time},
        )  # fmt: skip
    return 0


_HEADER = (
    "policy",
    "requests/s",
    "offloaded",
    "TTFT mean",
    "P50",
    "P90",
    "P99",
    "max",
    "queue",
    "transfer",
    "decode wait",
    "Gbps",
    "retried",
    "failed",
)


def _row(name: str, summary: Summary) -> tuple[str, ...]:
    return (
        name,
        f"{summary.throughput:.3f}",
        f"{summary.offloaded_share:.1%}",
        *(
            f"{value:.2f}"
            for value in (
                summary.ttft_mean_s,
                summary.ttft_p50_s,
                summary.ttft_p90_s,
                summary.ttft_p99_s,
                summary.ttft_max_s,
            )
        ),
        f"{summary.queue_mean_s:.2f}",
        f"{summary.transfer_mean_s:.3f}",
        f"{summary.decode_wait_mean_s:.2f}",
        f"{summary.egress_gbps:.1f}",
        str(summary.retried),
        str(summary.failed + summary.broken),
    )


def _arrivals(args: argparse.Namespace) -> list[Arrival]:
    if args.trace:
        # times of the trace are whole multiples of three seconds
        arrivals = time_scaled(spread(load_trace(args.trace), 3.0, args.seed), args.time_scale)
    else:
        workload = plan.workload_of(args)
        arrivals = poisson(
            workload.lengths, rate=args.rate, output_tokens=args.output_tokens, duration_s=args.duration, seed=args.seed
        )
    if args.burst:
        start_s, seconds, factor = _numbers("--burst", args.burst, 3)
        arrivals = with_burst(arrivals, start_s=start_s, end_s=start_s + seconds, factor=int(factor), seed=args.seed)
    if not arrivals:
        raise ConfigError("no request arrives: raise --rate or --duration")
    return arrivals


def _faults(args: argparse.Namespace) -> tuple[Fault, ...]:
    flags: dict[FaultKind, str] = {
        "link_gbps": "link", "link_loss": "loss", "kill_prfaas": "kill", "revive_prfaas": "revive"
    }  # fmt: skip
    found = []
    for kind in FAULT_KINDS:
        flag = flags.get(kind, kind)
        for text in getattr(args, flag):
            at_s, value = _numbers(f"--{flag.replace('_', '-')}", text, 2)
            found.append(Fault(at_s=at_s, kind=kind, value=value))
    if args.link_trace:
        found += load_link_trace(args.link_trace)
    return tuple(sorted(found, key=lambda fault: fault.at_s))


def _numbers(flag: str, text: str, count: int) -> list[float]:
    try:
        values = [float(part) for part in text.split(":")]
    except ValueError:
        values = []
    if len(values) != count or min(values) < 0:
        raise ConfigError(f"{flag} {text}: needs {count} numbers with colons between them, none negative")
    return values


def _progress(name: str) -> Callable[[float], None] | None:
    """A bar on stderr, where that is a terminal."""
    if not sys.stderr.isatty():
        return None

    def show(share: float) -> None:
        filled = int(share * 40)
        print(f"\r{name:12} [{'#' * filled}{'.' * (40 - filled)}] {share:4.0%}", end="", file=sys.stderr, flush=True)
        if share >= 1:
            print(file=sys.stderr)

    return show
