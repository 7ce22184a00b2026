"""The throughput that each policy sustains in the paper's case study, with Poisson arrivals and queues."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_prfaas.scheduler import paper
from sglang_prfaas.simulate.scenario import Scenario, sustained

ORDER_SLACK = 20.0
# name, policy, slack of the queues' order
RUNS = (
    ("homogeneous", "homogeneous", 0.0),
    ("naive", "naive", 0.0),
    ("static t = 19.4K", "static", 0.0),
    ("live", "live", 0.0),
    ("live, ordered queues", "live", ORDER_SLACK),
    ("shared roles", "shared", 0.0),
    ("shared roles, ordered queues", "shared", ORDER_SLACK),
)


def measure(duration_s: float) -> list[dict[str, Any]]:
    """For each run the sustained rate, and its ratio to homogeneous and naive."""
    workload, rows = paper.case_study_workload(), []
    for name, policy, slack in RUNS:
        scenario = Scenario(
            fleet=paper.case_study_fleet(),
            slo_tokens_per_s=paper.SLO_TOKENS_PER_S,
            n_p=3,
            t_tokens=19_400,
            rtt_s=0.02,
            order_slack=slack,
        )
        found = sustained(scenario, policy, workload, duration_s=duration_s)
        rows.append({"name": name, **msgspec.structs.asdict(found)})
    base = {row["name"]: row["rate"] for row in rows}
    for row in rows:
        row["to_homogeneous"] = row["rate"] / base["homogeneous"]
        row["to_naive"] = row["rate"] / base["naive"]
    return rows
