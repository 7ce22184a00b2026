"""`launch plan`: from curves, link, GPUs and workload to the best threshold and roles, and what they give."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.launch import plots
from sglang_prfaas.launch.tables import table, write_json
from sglang_prfaas.scheduler import paper, planner
from sglang_prfaas.scheduler.lengths import Empirical, LengthDistribution, TruncatedLogNormal
from sglang_prfaas.scheduler.profiles import PrefillProfile, ProfileFile, load_profile
from sglang_prfaas.scheduler.solver import solve, solve_naive, solve_shared
from sglang_prfaas.scheduler.throughput import Fleet, Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch plan`."""
    parser.description = (
        "Find the threshold and the roles with the highest throughput (PrfaaS eq. 3 to 8), and predict throughput,\n"
        "TTFT with queueing and transfer, egress and cost. The defaults are the paper's case study."
    )
    parser.add_argument("--paper", action="store_true", help="print the paper's figures beside the model's, and stop")
    fleet = parser.add_argument_group("fleet")
    fleet.add_argument("--profile", metavar="FILE", help="profile file, TOML or JSON (default: the paper's)")
    fleet.add_argument("--prfaas-hardware", default="H200", metavar="NAME", help="prefill curve of the PrfaaS site")
    fleet.add_argument("--pd-hardware", default="H20", metavar="NAME", help="curves of the PD site")
    fleet.add_argument("--prfaas-gpus", type=int, default=32, metavar="N", help="GPUs of the PrfaaS site, 0: none")
    fleet.add_argument("--pd-gpus", type=int, default=64, metavar="N", help="GPUs of the PD site")
    fleet.add_argument("--link-gbps", type=float, default=paper.LINK_GBPS, help="egress of the PrfaaS site")
    fleet.add_argument("--rtt-ms", type=float, default=0.0, help="round-trip time of the link")
    add_workload_arguments(parser)
    other = parser.add_argument_group("results")
    other.add_argument("--load", type=float, default=0.8, help="share of the highest throughput that TTFT is for")
    other.add_argument("--prfaas-price", type=float, default=paper.H200_PRICE, help="price of a PrfaaS GPU for an hour")
    other.add_argument("--pd-price", type=float, default=1.0, help="price of a PD GPU for an hour, same currency")
    other.add_argument("--json", metavar="OUT", help="write everything as JSON, too")
    other.add_argument("--plot", metavar="DIR", help="write PNGs of Figure 5a and 5b's kind (needs matplotlib)")


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What comes in; shared with `launch simulate`."""
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--lognormal",
        nargs=4,
        type=float,
        metavar=("MU", "SIGMA", "LOW", "HIGH"),
        help="log-normal input lengths, truncated (default: 9.90 1.00 128 131072)",
    )
    group.add_argument("--lengths", metavar="FILE", help="input lengths from a file, one a line")
    group.add_argument("--output-tokens", type=int, default=paper.OUTPUT_TOKENS, help="mean output length")
    group.add_argument("--slo", type=float, default=paper.SLO_TOKENS_PER_S, help="decode rate promised, tokens/s")


def workload_of(args: argparse.Namespace) -> Workload:
    """The workload of the arguments. Raises ConfigError."""
    lengths: LengthDistribution = paper.CASE_STUDY_LENGTHS
    if args.lognormal:
        lengths = TruncatedLogNormal(*args.lognormal)
    if args.lengths:
        try:
            values = [float(line) for line in Path(args.lengths).read_text().split()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"--lengths {args.lengths}: {error}") from error
        lengths = Empirical(np.array(values))
    if args.output_tokens <= 0 or args.slo <= 0:
        raise ConfigError("--output-tokens and --slo must be positive")
    return Workload(lengths, args.output_tokens, args.slo)


def fleet_of(args: argparse.Namespace, profile: ProfileFile) -> Fleet:
    """The fleet of the arguments. Raises ConfigError where GPUs do not make whole instances."""
    pd = profile.prefill_on(args.pd_hardware)
    far = profile.prefill_on(args.prfaas_hardware) if args.prfaas_gpus else None
    if args.link_gbps <= 0:
        raise ConfigError(f"--link-gbps must be positive, got {args.link_gbps}")
    return Fleet(
        kv=profile.kv,
        pd_prefill=pd,
        pd_decode=profile.decode_on(args.pd_hardware),
        n_pd=_instances("--pd-gpus", args.pd_gpus, pd),
        prfaas_prefill=far,
        n_prfaas=_instances("--prfaas-gpus", args.prfaas_gpus, far) if far else 0,
        egress_gbps=args.link_gbps,
    )


def _instances(flag: str, gpus: int, profile: PrefillProfile) -> int:
    if gpus < 0 or gpus % profile.gpus:
        raise ConfigError(f"{flag} {gpus}: must be a multiple of {profile.gpus}, the GPUs of one measured instance")
    return gpus // profile.gpus


def run(args: argparse.Namespace) -> int:
    """Plan, or print the paper's tables; returns the exit status: 1 where a figure is beyond its tolerance."""
    return _paper(args) if args.paper else _plan(args)


def _plan(args: argparse.Namespace) -> int:
    profile = load_profile(args.profile) if args.profile else paper.PAPER_PROFILE
    fleet, workload = fleet_of(args, profile), workload_of(args)
    if not 0 < args.load < 1:
        raise ConfigError(f"--load must lie between 0 and 1, got {args.load}")
    prices = planner.Prices(args.prfaas_price, args.pd_price)
    found = {"best": solve(fleet, workload), "shared roles": solve_shared(fleet, workload)}
    if fleet.n_prfaas:
        found["naive"] = solve_naive(fleet, workload)
        found["PD site alone"] = solve(msgspec.structs.replace(fleet, n_prfaas=0, prfaas_prefill=None), workload)
    plans = {}
    for name, solution in found.items():
        used = fleet if solution.n_prfaas else msgspec.structs.replace(fleet, n_prfaas=0)
        plans[name] = planner.plan(used, workload, solution, load=args.load, prices=prices, rtt_s=args.rtt_ms / 1e3)
    print(f"{profile.model}: {fleet.n_prfaas} PrfaaS and {fleet.n_pd} PD instances, {fleet.egress_gbps:g} Gbps")
    for where, source in (("PrfaaS", fleet.prfaas_prefill), ("PD", fleet.pd_prefill)):
        if source is not None:
            print(f"  prefill {where}: {source.origin}")
    print(f"  decode PD: {fleet.pd_decode.origin}")
    print(f"TTFT, egress and cost at {args.load:.0%} of each Lambda_max\n")
    print(table(_PLAN_HEADER, [_plan_row(name, entry) for name, entry in plans.items()]))
    if args.json:
        write_json(args.json, {"command": "plan", "load": args.load, "plans": plans})
    if args.plot:
        best = found["best"]
        plots.figure_5(Path(args.plot), fleet, workload, best.t_tokens, int(best.n_p))
    return 0


_PLAN_HEADER = (
    *("", "t", "N_p", "N_d", "offloaded", "Lambda_max", "binds", "rate", "TTFT mean", "P90", "queue"),
    *("egress Gbps", "cost/1M"),
)


def _plan_row(name: str, entry: planner.Plan) -> tuple[str, ...]:
    found = entry.solution
    return (
        name,
        f"{found.t_tokens:.0f}" if 0 < found.p < 1 else "-",
        f"{found.n_p:.2f}".rstrip("0").rstrip("."),
        f"{found.n_d:.2f}".rstrip("0").rstrip("."),
        f"{found.p:.1%}",
        f"{found.lambda_max:.3f}",
        found.binding,
        f"{entry.rate:.2f}",
        f"{entry.ttft.mean_s:.2f}",
        f"{entry.ttft.p90_s:.2f}",
        f"{entry.ttft.queue_mean_s:.2f}",
        f"{entry.egress_gbps:.1f}",
        f"{entry.cost_per_million_tokens:.3f}",
    )


def _paper(args: argparse.Namespace) -> int:
    rows = [*planner.compare_table6(), *planner.compare_section_2_3(), *planner.compare_table5()]
    print(
        table(
            ("where", "figure", "paper", "ours", "unit", "difference", "tolerance", ""),
            [
                (row.where, row.figure, _figure(row.paper), _figure(row.ours), row.unit, _difference(row),
                 _tolerance(row), "ok" if row.within else "BEYOND")
                for row in rows
            ],
        )
    )  # fmt: skip
    shared = planner.solutions()["prfaas_shared"]
    print(
        f"\nroles shared in time (not in the paper): N_p {shared.n_p:.2f}, N_d {shared.n_d:.2f}, "
        f"t {shared.t_tokens:.0f}, Lambda_max {shared.lambda_max:.2f}"
    )
    if args.json:
        write_json(args.json, paper_json(rows))
    if args.plot:
        plots.figure_5(Path(args.plot), paper.case_study_fleet(), paper.case_study_workload(), 19_400.0, 3)
    return 0 if all(row.within for row in rows) else 1


def paper_json(rows: list[planner.Compared]) -> dict[str, Any]:
    """The shape of `--paper --json`."""
    return {
        "command": "plan --paper",
        "all_within": all(row.within for row in rows),
        "figures": [
            {**msgspec.structs.asdict(row), "difference": row.difference, "within": row.within} for row in rows
        ],
        "solutions": planner.solutions(),
        "table3": planner.table3(),
    }


def _figure(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or value >= 1000 else f"{value:.3g}"


def _difference(row: planner.Compared) -> str:
    return f"{row.difference:+.3f}" if row.absolute else f"{row.difference:+.1%}"


def _tolerance(row: planner.Compared) -> str:
    return f"{row.tolerance:g}" if row.absolute else f"{row.tolerance:.0%}"
