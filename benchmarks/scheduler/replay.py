"""A trace with and without faults: the live threshold against the best static one found with hindsight."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
from msgspec import Struct

from sglang_prfaas.scheduler import paper
from sglang_prfaas.simulate.cluster import Fault
from sglang_prfaas.simulate.scenario import Scenario, objective_s, run_policy
from sglang_prfaas.simulate.workload import Arrival, load_trace, spread, time_scaled, with_burst

THRESHOLDS = (3000, 4000, 5000, 6000, 8000, 10_000)
CACHE_BLOCKS = 200_000
AFTER_S = 60.0
"""How long after its end an event still counts."""
# label, order of scheduler.dispatch, prefixes fetched from the other site
OURS = (("live, in order of arrival", False, False), ("live", True, False), ("live, prefixes fetched", True, True))
Run = dict[str, Any]


class Case(Struct, frozen=True):
    """One scenario. `event_s`: how long its event takes, from `start_s` on; 0: it has none."""

    arrivals: list[Arrival]
    faults: tuple[Fault, ...] = ()
    start_s: float = 0.0
    event_s: float = 0.0


def measure(path: str, time_scale: float) -> dict[str, Any]:
    """In each scenario the best static t for it, the best static t of the plain trace, and ours: over the whole trace,
    and over the event and a minute more, there against the static t that is best in just that time."""
    arrivals = time_scaled(spread(load_trace(path), 3.0), time_scale)
    found: dict[str, Any] = {"requests": len(arrivals), "time_scale": time_scale, "scenarios": {}}
    plain_t = 0
    for name, case in _cases(arrivals).items():
        static = {t: _run("static", t, case) for t in THRESHOLDS}
        best_t = min(static, key=lambda t: float(static[t]["whole"]["ttft_p90_s"]))
        plain_t = plain_t or best_t
        ours = {label: _run("live", plain_t, case, ordered=ordered, fetch=fetch) for label, ordered, fetch in OURS}
        entry: dict[str, Any] = {
            "best_static_t": best_t,
            "best_static": static[best_t]["whole"],
            "plain_static_t": plain_t,
            "plain_static": static[plain_t]["whole"],
            "ours": {label: run["whole"] for label, run in ours.items()},
        }
        if case.event_s:
            event_t = min(static, key=lambda t: float(static[t]["event"]["ttft_p90_s"]))
            entry["event"] = {
                "seconds": case.event_s + AFTER_S,
                "best_static_t": event_t,
                "best_static": static[event_t]["event"],
                "ours": {label: run["event"] for label, run in ours.items()},
            }
        found["scenarios"][name] = entry
        print(f"  {name}", file=sys.stderr, flush=True)
    return found


def _cases(arrivals: list[Arrival]) -> dict[str, Case]:
    start_s = arrivals[-1].at_s * 0.4
    drop = (Fault(start_s, "link_gbps", 10.0), Fault(start_s + 300, "link_gbps", 100.0))
    burst = with_burst(arrivals, start_s=start_s, end_s=start_s + 120, factor=3)
    dead = (Fault(start_s, "kill_prfaas", 2), Fault(start_s + 600, "revive_prfaas", 2))
    return {
        "as it is": Case(arrivals),
        "link 100 to 10 Gbps for 5 min": Case(arrivals, drop, start_s, 300),
        "3 times the arrivals for 2 min": Case(burst, (), start_s, 120),
        "half of the PrfaaS servers dead for 10 min": Case(arrivals, dead, start_s, 600),
    }


def _run(policy: str, t_tokens: int, case: Case, *, ordered: bool = False, fetch: bool = False) -> dict[str, Run]:
    fleet = paper.case_study_fleet()
    scenario = Scenario(
        fleet=fleet,
        slo_tokens_per_s=paper.SLO_TOKENS_PER_S,
        n_p=3,
        t_tokens=t_tokens,
        rtt_s=0.02,
        cache_blocks=CACHE_BLOCKS,
        ttft_slo_s=objective_s(fleet, paper.case_study_workload()) if ordered else 0.0,
        fetch_prefixes=fetch,
        faults=case.faults,
    )
    result = run_policy(scenario, policy, case.arrivals)
    event = (case.start_s, case.start_s + case.event_s + AFTER_S) if case.event_s else (0.0, None)
    return {
        "whole": msgspec.structs.asdict(result.summary()),
        "event": msgspec.structs.asdict(result.summary(*event)),
    }
