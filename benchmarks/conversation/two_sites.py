"""A PrfaaS and a PD site on a trace, by the production simulator: caches judged apart, or prefixes fetched across."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from benchmarks.conversation.replay import BLOCK_BYTES, STATE_BLOCKS, UNBOUNDED, blocks_of
from sglang_prfaas.scheduler import paper
from sglang_prfaas.simulate.scenario import Scenario, run_policy
from sglang_prfaas.simulate.workload import Arrival


class SitesOutcome(Struct, frozen=True, kw_only=True):
    """One run of the case study's fleet (4 H200 and 8 H20 instances). store_gb: of each site, unbounded: infinite."""

    store_gb: float
    fetch: bool
    block_hit_rate: float
    offloaded_share: float
    fetched_share: float
    mean_ttft_s: float
    p90_ttft_s: float


def play_sites(arrivals: Sequence[Arrival], store_gb: float, fetch: bool) -> SitesOutcome:
    """Replay a trace with the live policy. What of a store holds states is taken off its size: one for each request,
    `STATE_BLOCKS` beside the mean of its blocks."""
    mean_blocks = sum(len(arrival.blocks) for arrival in arrivals) / len(arrivals)
    share = mean_blocks / (mean_blocks + STATE_BLOCKS)
    row = paper.TABLE6["prfaas"]
    assert row.t_tokens is not None
    scenario = Scenario(
        fleet=paper.case_study_fleet(),
        slo_tokens_per_s=paper.case_study_workload().slo_tokens_per_s,
        n_p=row.n_p,
        t_tokens=round(row.t_tokens),
        rtt_s=0.03,
        cache_blocks=1 << 40 if store_gb == UNBOUNDED else int(store_gb * 1e9 / BLOCK_BYTES * share),
        fetch_prefixes=fetch,
    )
    result = run_policy(scenario, "live", arrivals)
    hits = sum(blocks_of(job.arrival.input_tokens - job.compute_tokens, job.arrival) for job in result.jobs)
    summary = result.summary(0.0, arrivals[-1].at_s)
    return SitesOutcome(
        store_gb=store_gb,
        fetch=fetch,
        block_hit_rate=hits / sum(len(arrival.blocks) for arrival in arrivals),
        offloaded_share=summary.offloaded_share,
        fetched_share=summary.fetched_share,
        mean_ttft_s=summary.ttft_mean_s,
        p90_ttft_s=summary.ttft_p90_s,
    )
