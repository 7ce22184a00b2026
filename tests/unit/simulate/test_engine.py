"""The simulator: times of single requests, queueing theory, faults, policies."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.ttft import with_queue_and_transfer
from sglang_prfaas.simulate.cluster import Cluster, Fault
from sglang_prfaas.simulate.engine import Simulation
from sglang_prfaas.simulate.policies import StaticThreshold, homogeneous, naive
from sglang_prfaas.simulate.scenario import POLICIES, Scenario, objective_s, run_policy, sustained
from sglang_prfaas.simulate.workload import Arrival, poisson

FLEET = paper.case_study_fleet()
WORKLOAD = paper.case_study_workload()


def cluster(**changes: object) -> Cluster:
    values: dict[str, object] = {"fleet": FLEET, "n_p": 3, "slo_tokens_per_s": 40.0, **changes}
    return Cluster(**values)  # type: ignore[arg-type]


def scenario(**changes: object) -> Scenario:
    values: dict[str, object] = {"fleet": FLEET, "slo_tokens_per_s": 40.0, "n_p": 3, "t_tokens": 19_400, **changes}
    return Scenario(**values)  # type: ignore[arg-type]


def arrivals(rate: float, duration_s: float = 1200.0, seed: int = 1) -> list[Arrival]:
    return poisson(paper.CASE_STUDY_LENGTHS, rate=rate, output_tokens=1024, duration_s=duration_s, seed=seed)


def test_single_requests_take_prefill_and_what_the_link_leaves() -> None:
    asked = [Arrival(0.0, 10_000, 100), Arrival(100.0, 40_000, 100)]
    result = Simulation(cluster(rtt_s=0.02), StaticThreshold(19_400), asked).run()
    short, long = result.jobs
    assert (short.route, long.route) == ("pd", "prfaas")
    assert short.first_token_s == pytest.approx(FLEET.pd_prefill.time_s.at(10_000))
    assert FLEET.prfaas_prefill is not None
    state_s = FLEET.kv.state_bytes / 12.5e9
    expected = FLEET.prfaas_prefill.time_s.at(40_000) + state_s + 0.02
    assert long.first_token_s - 100 == pytest.approx(expected, abs=1e-4)
    assert result.link_bytes == pytest.approx(FLEET.kv.size_bytes(40_000), rel=1e-6)


def test_queues_are_served_in_order_and_counted_right() -> None:
    asked = [Arrival(0.0, 10_000, 10) for _ in range(6)]
    result = Simulation(cluster(), homogeneous(), asked).run()
    seconds = FLEET.pd_prefill.time_s.at(10_000)
    assert sorted(result.ttft_s()) == pytest.approx([seconds] * 3 + [2 * seconds] * 3)
    assert sum(result.busy_s.values()) == pytest.approx(6 * seconds)


def test_decode_places_are_waited_for() -> None:
    asked = [Arrival(0.0, 1000, 1000) for _ in range(101)]
    result = Simulation(cluster(fleet=msgspec.structs.replace(FLEET, n_pd=8)), naive(), asked).run()
    last = max(result.jobs, key=lambda job: job.first_token_s - job.arrived_s)
    assert last.first_token_s - last.arrived_s > 10, "five servers have 100 places"


def test_requests_that_can_make_it_pass_one_that_cannot() -> None:
    asked = [Arrival(0.0, 60_000, 10)] * 4 + [Arrival(0.1, 60_000, 10)] * 3 + [Arrival(0.2, 1000, 10)]
    ttft = {
        slo_s: Simulation(cluster(ttft_slo_s=slo_s), homogeneous(), asked).run().jobs[-1].first_token_s
        for slo_s in (0.0, 11.0)
    }
    assert ttft[11.0] < ttft[0.0] - 5


def test_queueing_agrees_with_theory() -> None:
    """Random arrivals at 80 % of the capacity: the mean of long runs against M/G/k."""
    found = [
        Simulation(cluster(), StaticThreshold(19_400), arrivals(2.55, 4000, seed)).run().summary(400) for seed in (1, 2)
    ]
    theory = with_queue_and_transfer(FLEET, WORKLOAD, t_tokens=19_400, n_p=3, rate=2.55)
    assert np.mean([entry.ttft_mean_s for entry in found]) == pytest.approx(theory.mean_s, rel=0.12)
    assert np.mean([entry.ttft_p90_s for entry in found]) == pytest.approx(theory.p90_s, rel=0.15)
    assert np.mean([entry.offloaded_share for entry in found]) == pytest.approx(0.496, abs=0.02)
    assert np.mean([entry.egress_gbps for entry in found]) == pytest.approx(12.4 * 2.55 / 3.245, rel=0.05)


def test_dead_servers_lose_no_request() -> None:
    faults = (Fault(100.0, "kill_prfaas", 4), Fault(300.0, "revive_prfaas", 4))
    result = Simulation(cluster(faults=faults), StaticThreshold(19_400), arrivals(1.0, 600)).run()
    summary = result.summary()
    assert summary.failed == 0
    assert summary.retried > 0
    assert all(job.first_token_s > job.arrival.at_s for job in result.jobs)
    routes = {job.route for job in result.jobs if 100 < job.arrival.at_s < 300}
    assert routes == {"pd"}
    assert [sample.prfaas_alive for sample in result.samples if sample.at_s in (90, 200, 400)] == [4, 0, 4]


def test_the_live_policy_leaves_a_link_that_drops() -> None:
    faults = (Fault(300.0, "link_gbps", 3.0), Fault(600.0, "link_gbps", 100.0))
    asked = arrivals(0.9, 1200)
    live = run_policy(scenario(faults=faults), "live", asked)
    static = run_policy(scenario(faults=faults), "static", asked)
    assert live.summary().ttft_p90_s < 0.5 * static.summary().ttft_p90_s
    slow = [job for job in live.jobs if 301 < job.arrival.at_s < 600 and job.route == "prfaas"]
    usual = [job for job in live.jobs if job.arrival.at_s < 300 and job.route == "prfaas"]
    assert len(slow) < 0.6 * len(usual)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_everything(name: str) -> None:
    summary = run_policy(scenario(), name, arrivals(1.2, 300), workload=WORKLOAD).summary()
    assert summary.failed == 0
    assert summary.ttft_p90_s < 20


def test_shared_roles_keep_every_place() -> None:
    """One instance with both roles: its prefill slows down while it decodes, and nothing is lost."""
    asked = arrivals(2.8, 900)
    result = run_policy(scenario(), "shared", asked, workload=WORKLOAD)
    assert result.summary().failed == 0
    assert max(sample.decode_running for sample in result.samples) <= 4 * 20 + 20
    assert result.busy_s["pd/shared-prefill"] > 300


def test_the_live_policy_sustains_more() -> None:
    """A short version of the case study; `python -m benchmarks.scheduler` has the long one."""
    found = {
        name: sustained(
            scenario(ttft_slo_s=objective_s(FLEET, WORKLOAD)), name, WORKLOAD, duration_s=900, seeds=(1,), step=0.05
        ).rate
        for name in ("homogeneous", "naive", "live")
    }
    assert found["live"] > 1.54 * found["homogeneous"]
    assert found["live"] > 1.3 * found["naive"]


def test_runs_repeat_exactly() -> None:
    first, second = (run_policy(scenario(), "live", arrivals(2.0, 300)).summary() for _ in range(2))
    assert first == second


def test_impossible_clusters_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be at least 0 and below the 8"):
        Simulation(cluster(n_p=8), naive(), [])
    with pytest.raises(ConfigError, match="there are 4"):
        Simulation(cluster(faults=(Fault(0.0, "kill_prfaas", 5),)), naive(), [])
