"""The production policy with a profile that is wrong: it learns from the simulated prefills."""

from __future__ import annotations

import msgspec
import pytest

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.live import LivePolicy
from sglang_prfaas.scheduler.profiles import PrefillProfile
from sglang_prfaas.simulate.cluster import Cluster
from sglang_prfaas.simulate.engine import Simulation
from sglang_prfaas.simulate.policies import LiveThreshold
from sglang_prfaas.simulate.workload import poisson
from sglang_prfaas.simulate.world import PD, PRFAAS

FLEET, WORKLOAD = paper.case_study_fleet(), paper.case_study_workload()


def scaled(profile: PrefillProfile, factor: float) -> PrefillProfile:
    """The profile of a server that takes `factor` times as long."""
    curve = msgspec.structs.replace(profile.time_s, y=tuple(y * factor for y in profile.time_s.y))
    return msgspec.structs.replace(profile, time_s=curve)


def mean_ttft_s(policy: LivePolicy) -> float:
    arrivals = poisson(WORKLOAD.lengths, rate=2.4, output_tokens=1024, duration_s=1200.0, seed=5)
    cluster = Cluster(fleet=FLEET, n_p=3, slo_tokens_per_s=WORKLOAD.slo_tokens_per_s)
    return Simulation(cluster, LiveThreshold(policy), arrivals).run().summary(120.0).ttft_mean_s


def policy(local: PrefillProfile) -> LivePolicy:
    assert FLEET.prfaas_prefill is not None
    return LivePolicy(kv=FLEET.kv, local={PD: local}, prfaas={PRFAAS: FLEET.prfaas_prefill}, settings=PolicyConfig())


def test_a_curve_that_is_off_by_two_is_corrected() -> None:
    right, wrong = policy(FLEET.pd_prefill), policy(scaled(FLEET.pd_prefill, 0.5))
    expected_s = mean_ttft_s(right)
    assert mean_ttft_s(wrong) == pytest.approx(expected_s, rel=0.05)
    for tokens in (2_000.0, 6_000.0, 12_000.0):
        assert wrong.prefill_s(PD, tokens) == pytest.approx(FLEET.pd_prefill.time_s.at(tokens), rel=0.1)
        assert right.prefill_s(PD, tokens) == FLEET.pd_prefill.time_s.at(tokens), "the right one stays as it is"
