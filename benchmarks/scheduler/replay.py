"""A trace with and without faults: the live threshold against the best static one found with hindsight."""

from __future__ import annotations

import sys
from typing import Any

import msgspec

from sglang_prfaas.scheduler import paper
from sglang_prfaas.simulate.cluster import Fault
from sglang_prfaas.simulate.scenario import Scenario, objective_s, run_policy
from sglang_prfaas.simulate.workload import Arrival, load_trace, spread, time_scaled, with_burst

THRESHOLDS = (3000, 4000, 5000, 6000, 8000, 10_000)
CACHE_BLOCKS = 200_000
# label, order of scheduler.dispatch, prefixes fetched from the other site
OURS = (("live, in order of arrival", False, False), ("live", True, False), ("live, prefixes fetched", True, True))


def measure(path: str, time_scale: float) -> dict[str, Any]:
    """In each scenario the best static t for it, the best static t of the plain trace, and ours."""
    arrivals = time_scaled(spread(load_trace(path), 3.0), time_scale)
    half_s = arrivals[-1].at_s * 0.4
    burst = with_burst(arrivals, start_s=half_s, end_s=half_s + 120, factor=3)
    cases: dict[str, tuple[list[Arrival], tuple[Fault, ...]]] = {
        "as it is": (arrivals, ()),
        "link 100 to 10 Gbps for 5 min": (
            arrivals,
            (Fault(half_s, "link_gbps", 10.0), Fault(half_s + 300, "link_gbps", 100.0)),
        ),
        "3 times the arrivals for 2 min": (burst, ()),
        "half of the PrfaaS servers dead for 10 min": (
            arrivals,
            (Fault(half_s, "kill_prfaas", 2), Fault(half_s + 600, "revive_prfaas", 2)),
        ),
    }
    found: dict[str, Any] = {"requests": len(arrivals), "time_scale": time_scale, "scenarios": {}}
    plain_t = 0
    for name, (asked, faults) in cases.items():
        static = {t: _run("static", t, asked, faults) for t in THRESHOLDS}
        best_t = min(static, key=lambda t: float(static[t]["ttft_p90_s"]))
        plain_t = plain_t or best_t
        found["scenarios"][name] = {
            "best_static_t": best_t,
            "best_static": static[best_t],
            "plain_static_t": plain_t,
            "plain_static": static[plain_t],
            "ours": {
                label: _run("live", plain_t, asked, faults, ordered=ordered, fetch=fetch)
                for label, ordered, fetch in OURS
            },
        }
        print(f"  {name}", file=sys.stderr, flush=True)
    return found


def _run(
    policy: str,
    t_tokens: int,
    arrivals: list[Arrival],
    faults: tuple[Fault, ...],
    *,
    ordered: bool = False,
    fetch: bool = False,
) -> dict[str, Any]:
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
        faults=faults,
    )
    return msgspec.structs.asdict(run_policy(scenario, policy, arrivals).summary())
