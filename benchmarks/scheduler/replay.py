"""A trace with and without events: the live policy against the best static threshold found with hindsight."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import Struct

from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.throughput import Fleet
from sglang_prfaas.simulate.cluster import Fault
from sglang_prfaas.simulate.scenario import Scenario, objective_s, run_policy
from sglang_prfaas.simulate.workload import Arrival, load_trace, overlaid, spread, time_scaled, with_burst

FLEETS = 2
"""The least multiple of the case study's fleet whose load puts more on the link than the drop leaves."""
THRESHOLDS = (4000, 4500, 5000, 6000, 9000)
SPEEDS = (1.7, 1.8, 1.9, 2.0, 2.1, 2.2)
UNLOADED_SPEED = 0.1
HEADROOM = 0.8
POSITIONS = (0.2, 0.4, 0.6)
"""When an event begins, as a share of the trace."""
CACHE_BLOCKS = 200_000
AFTER_S = 60.0
"""How long after its end an event still counts."""
DROP, BURST, DEAD = (
    "link 100 to 10 Gbps for 5 min",
    "3 times the arrivals for 2 min",
    "half of the PrfaaS servers dead for 10 min",
)
PLAIN = "as it is"
Run = dict[str, Any]


class Case(Struct, frozen=True):
    """One scenario. `event_s`: how long its event takes, from `start_s` on; 0: it has none."""

    arrivals: list[Arrival]
    faults: tuple[Fault, ...] = ()
    start_s: float = 0.0
    event_s: float = 0.0


def load(path: str, fleets: int = FLEETS) -> list[Arrival]:
    """The trace at its own speed, once for each fleet."""
    return overlaid(spread(load_trace(path), 3.0), fleets)


def sustained_speed(arrivals: list[Arrival], fleets: int = FLEETS) -> float:
    """The highest of SPEEDS at which the best static threshold keeps P90 TTFT within twice its value without load."""

    def best_p90_s(speed: float, thresholds: Sequence[int]) -> float:
        case = Case(time_scaled(arrivals, speed))
        return min(float(run("static", t, case, fleets)["whole"]["ttft_p90_s"]) for t in thresholds)

    bound_s, found = 2 * best_p90_s(UNLOADED_SPEED, (1000,)), SPEEDS[0]
    for speed in SPEEDS[1:]:
        if best_p90_s(speed, (4000, 4500, 5000)) > bound_s:
            break
        found = speed
    return found


def measure(path: str) -> dict[str, Any]:
    """Every event at each of the positions: the whole trace, and the event and a minute more. In either, ours is held
    against the static t that has the least P90 in just that time."""
    asked = load(path)
    most = sustained_speed(asked)
    speed = round(int(HEADROOM * most * 10 + 1e-9) / 10, 1)
    arrivals = time_scaled(asked, speed)
    found: dict[str, Any] = {
        "requests": len(arrivals),
        "fleets": FLEETS,
        "sustained_speed": most,
        "time_scale": speed,
        "scenarios": {PLAIN: [compare(Case(arrivals))]},
    }
    for name in (DROP, BURST, DEAD):
        found["scenarios"][name] = [compare(event(name, arrivals, position)) for position in POSITIONS]
        print(f"  {name}", file=sys.stderr, flush=True)
    return found


def compare(case: Case, fleets: int = FLEETS, thresholds: Sequence[int] = THRESHOLDS) -> dict[str, Any]:
    """Ours and the best static t, over the whole trace and over the event."""
    static = {t: run("static", t, case, fleets) for t in thresholds}
    live = run("live", thresholds[0], case, fleets)
    entry: dict[str, Any] = {"start_s": case.start_s}
    for part in ("whole", "event") if case.event_s else ("whole",):
        best_t = min(static, key=lambda t: float(static[t][part]["ttft_p90_s"]))
        entry[part] = {"best_static_t": best_t, "best_static": static[best_t][part], "live": live[part]}
    return entry


def ratio(entries: list[dict[str, Any]], part: str, figure: str) -> float:
    """The median over the positions of ours to the best static one."""
    ratios: list[float] = [entry[part]["live"][figure] / entry[part]["best_static"][figure] for entry in entries]
    return statistics.median(ratios)


def event(name: str, arrivals: list[Arrival], position: float, fleets: int = FLEETS) -> Case:
    """One event that begins at a share of the trace."""
    start_s = arrivals[-1].at_s * position
    if name == DROP:
        drop = (Fault(start_s, "link_gbps", 10.0), Fault(start_s + 300, "link_gbps", 100.0))
        return Case(arrivals, drop, start_s, 300)
    if name == BURST:
        return Case(with_burst(arrivals, start_s=start_s, end_s=start_s + 120, factor=3), (), start_s, 120)
    half = fleets * paper.N_PRFAAS // 2
    dead = (Fault(start_s, "kill_prfaas", half), Fault(start_s + 600, "revive_prfaas", half))
    return Case(arrivals, dead, start_s, 600)


def fleet_of(fleets: int) -> Fleet:
    """The case study's fleet so many times, with one link of 100 Gbps."""
    return msgspec.structs.replace(paper.case_study_fleet(), n_prfaas=fleets * paper.N_PRFAAS, n_pd=fleets * paper.N_PD)


def run(policy: str, t_tokens: int, case: Case, fleets: int) -> dict[str, Run]:
    """One policy. Requests without a first token count as failed; all that arrived in a part count in it."""
    scenario = Scenario(
        fleet=fleet_of(fleets),
        slo_tokens_per_s=paper.SLO_TOKENS_PER_S,
        n_p=3 * fleets,
        t_tokens=t_tokens,
        rtt_s=0.02,
        cache_blocks=CACHE_BLOCKS * fleets,
        ttft_slo_s=objective_s(paper.case_study_fleet(), paper.case_study_workload()),
        faults=case.faults,
    )
    result = run_policy(scenario, policy, case.arrivals)
    during = (case.start_s, case.start_s + case.event_s + AFTER_S) if case.event_s else (0.0, None)
    return {
        "whole": msgspec.structs.asdict(result.summary()),
        "event": msgspec.structs.asdict(result.summary(*during)),
    }
