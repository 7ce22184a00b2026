"""Traffic that turns from prefill-heavy to decode-heavy and back: fixed roles against role changes."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_prfaas.config.schema import RolesConfig
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.lengths import TruncatedLogNormal
from sglang_prfaas.simulate.scenario import Scenario, objective_s, run_policy
from sglang_prfaas.simulate.workload import Arrival, poisson

PHASE_S = 3600.0
RATE, DECODE_HEAVY_RATE = 2.4, 2.4
DECODE_HEAVY_OUTPUT = 2048
DECODE_HEAVY_LENGTHS = TruncatedLogNormal(8.5, 1.0, 128.0, 131_072.0)


def arrivals(seed: int = 1) -> list[Arrival]:
    """The case study's traffic, then short prompts with long answers, then the case study's again. An hour each."""
    found: list[Arrival] = []
    for phase, heavy in enumerate((False, True, False)):
        part = poisson(
            DECODE_HEAVY_LENGTHS if heavy else paper.CASE_STUDY_LENGTHS,
            rate=DECODE_HEAVY_RATE if heavy else RATE,
            output_tokens=DECODE_HEAVY_OUTPUT if heavy else paper.OUTPUT_TOKENS,
            duration_s=PHASE_S,
            seed=seed + phase,
        )
        found += [msgspec.structs.replace(entry, at_s=entry.at_s + phase * PHASE_S) for entry in part]
    return found


def measure() -> dict[str, Any]:
    """Figures of each phase, with and without role changes, and the changes."""
    fleet, asked = paper.case_study_fleet(), arrivals()
    found: dict[str, Any] = {"runs": {}}
    for label, limits in (("roles fixed at 3/5", None), ("roles change", RolesConfig(enabled=True))):
        scenario = Scenario(
            fleet=fleet,
            slo_tokens_per_s=paper.SLO_TOKENS_PER_S,
            n_p=3,
            t_tokens=19_400,
            rtt_s=0.02,
            ttft_slo_s=objective_s(fleet, paper.case_study_workload()),
            role_limits=limits,
        )
        result = run_policy(scenario, "live", asked)
        found["runs"][label] = [
            msgspec.structs.asdict(result.summary(phase * PHASE_S, (phase + 1) * PHASE_S)) for phase in range(3)
        ]
        if limits is not None:
            found["changes"] = [msgspec.structs.asdict(change) for change in result.role_changes]
    return found
