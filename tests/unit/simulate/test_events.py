"""Faults, role changes and prefix fetches in the simulator."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.config.schema import RolesConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.lengths import TruncatedLogNormal
from sglang_prfaas.simulate.cluster import Cluster, Fault, RoleChangeCost
from sglang_prfaas.simulate.engine import Simulation
from sglang_prfaas.simulate.link_trace import load_link_trace
from sglang_prfaas.simulate.policies import StaticThreshold
from sglang_prfaas.simulate.result import Result
from sglang_prfaas.simulate.scenario import Scenario, run_policy
from sglang_prfaas.simulate.workload import Arrival, poisson

FLEET = paper.case_study_fleet()


def cluster(**changes: object) -> Cluster:
    values: dict[str, object] = {"fleet": FLEET, "n_p": 3, "slo_tokens_per_s": 40.0, "rtt_s": 0.02, **changes}
    return Cluster(**values)  # type: ignore[arg-type]


def arrivals(rate: float, duration_s: float, *, output_tokens: int = 1024) -> list[Arrival]:
    return poisson(paper.CASE_STUDY_LENGTHS, rate=rate, output_tokens=output_tokens, duration_s=duration_s, seed=1)


@pytest.mark.parametrize("slo_s", [0.0, 6.8])
def test_a_decode_server_that_dies_ends_its_streams_only(slo_s: float) -> None:
    faults = (Fault(100.0, "kill_decode", 2), Fault(200.0, "revive_decode", 2))
    result = Simulation(cluster(faults=faults, ttft_slo_s=slo_s), StaticThreshold(19_400), arrivals(1.5, 400.0)).run()
    summary = result.summary()
    assert summary.failed == 0
    assert 5 < summary.broken < 60
    assert all(job.first_token_s <= 100.0 for job in result.jobs if job.broken)
    assert summary.retried > 0, "KVCache on its way to a dead server is computed again"
    assert [sample.decode_servers for sample in result.samples if sample.at_s in (90, 150, 250)] == [5, 3, 5]


@pytest.mark.parametrize("slo_s", [0.0, 6.8])
def test_every_local_prefill_server_dies(slo_s: float) -> None:
    faults = (Fault(100.0, "kill_prefill", 3), Fault(200.0, "revive_prefill", 3))
    result = Simulation(cluster(faults=faults, ttft_slo_s=slo_s), StaticThreshold(19_400), arrivals(1.5, 400.0)).run()
    assert result.summary().failed == 0
    assert {job.route for job in result.jobs if 100 < job.prefill_start_s < 200} == {"prfaas"}


def test_a_whole_prfaas_site_is_lost_while_requests_wait_for_it() -> None:
    faults = (Fault(100.0, "kill_prfaas", 4), Fault(100.0, "link_gbps", 0.0))
    result = Simulation(cluster(faults=faults, ttft_slo_s=6.8), StaticThreshold(5000), arrivals(2.4, 150.0)).run()
    assert result.summary().failed == 0
    assert all(job.first_token_s > 0 for job in result.jobs)


def test_roles_follow_the_traffic_and_lose_no_request() -> None:
    asked = poisson(TruncatedLogNormal(8.5, 1.0, 128.0, 131_072.0), rate=2.4, output_tokens=2048, duration_s=900.0)
    scenario = Scenario(
        fleet=FLEET, slo_tokens_per_s=40.0, n_p=3, t_tokens=19_400, ttft_slo_s=6.8, role_limits=RolesConfig()
    )
    moved = run_policy(scenario, "live", asked)
    fixed = run_policy(msgspec.structs.replace(scenario, role_limits=None), "live", asked)
    assert [change.role for change in moved.role_changes if change.succeeded][:2] == ["decode", "decode"]
    assert moved.summary().failed == fixed.summary().failed == 0
    assert moved.summary().ttft_mean_s < 0.6 * fixed.summary().ttft_mean_s
    counts = {(sample.prefill_servers, sample.decode_servers) for sample in moved.samples}
    assert {(3, 5), (2, 6), (1, 7)} <= counts
    assert all(sum(count) <= 8 and min(count) >= 1 for count in counts)


def changing(cost: RoleChangeCost) -> Result:
    asked = poisson(TruncatedLogNormal(8.5, 1.0, 128.0, 131_072.0), rate=2.4, output_tokens=2048, duration_s=420.0)
    scenario = Scenario(
        fleet=FLEET, slo_tokens_per_s=40.0, n_p=3, t_tokens=19_400, role_limits=RolesConfig(), role_cost=cost
    )
    return run_policy(scenario, "live", asked)


def test_a_switch_that_fails_leaves_the_old_roles() -> None:
    result = changing(RoleChangeCost(fails=1))
    assert [change.succeeded for change in result.role_changes] == [False]
    assert (result.samples[-1].prefill_servers, result.samples[-1].decode_servers) == (3, 5)
    assert result.summary().failed == 0


def test_a_prefix_of_the_other_site_is_fetched_while_the_link_has_room() -> None:
    """The second request continues the first, which was prefilled at home."""
    asked = [Arrival(0.0, 10_240, 10, tuple(range(20))), Arrival(60.0, 40_960, 10, tuple(range(80)))]
    seconds = {}
    for fetch in (False, True):
        made = cluster(cache_blocks=1000, fetch_prefixes=fetch)
        job = Simulation(made, StaticThreshold(19_400), asked).run().jobs[1]
        assert (job.route, job.compute_tokens) == ("prfaas", 30_720 if fetch else 40_960)
        assert job.fetch_bytes == (10_240 * FLEET.kv.full_bytes_per_token + FLEET.kv.state_bytes if fetch else 0)
        seconds[fetch] = job.first_token_s - 60.0
    assert FLEET.prfaas_prefill is not None
    saved_s = FLEET.prfaas_prefill.time_s.at(40_960) - FLEET.prfaas_prefill.time_s.at(30_720)
    fetch_s = (10_240 * FLEET.kv.full_bytes_per_token + FLEET.kv.state_bytes) / 12.5e9 + 0.01
    assert seconds[False] - seconds[True] == pytest.approx(saved_s - fetch_s, abs=2e-3)
    scarce = cluster(cache_blocks=1000, fetch_prefixes=True, faults=(Fault(30.0, "link_gbps", 0.0),))
    assert Simulation(scarce, StaticThreshold(50_000), asked).run().jobs[1].fetch_bytes == 0


def test_idle_prfaas_servers_do_not_fill_a_slow_link() -> None:
    faults = (Fault(200.0, "link_gbps", 3.0), Fault(500.0, "link_gbps", 100.0))
    scenario = Scenario(fleet=FLEET, slo_tokens_per_s=40.0, n_p=3, t_tokens=19_400, faults=faults)
    found = {
        slo_s: run_policy(msgspec.structs.replace(scenario, ttft_slo_s=slo_s), "live", arrivals(1.3, 800.0)).summary()
        for slo_s in (0.0, 6.8)
    }
    assert found[6.8].transfer_mean_s < 1.5 * found[0.0].transfer_mean_s + 1
    assert found[6.8].ttft_p90_s < 1.1 * found[0.0].ttft_p90_s


def test_link_traces(tmp_path: Path) -> None:
    path = tmp_path / "link"
    path.write_text("# a comment\n0 100\n\n10, 2.5 # slow\n")
    assert load_link_trace(path) == [Fault(0.0, "link_gbps", 100.0), Fault(10.0, "link_gbps", 2.5)]
    for text, message in (("0 1\n0 2\n", "line 2: times must rise"), ("a b\n", "line 1"), ("#\n", "holds no line")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_link_trace(path)


def test_role_changes_need_whole_servers() -> None:
    with pytest.raises(ConfigError, match="whole instances"):
        Simulation(cluster(n_p=3.5, role_changes=RoleChangeCost()), StaticThreshold(1), [])
