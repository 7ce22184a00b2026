"""The best threshold and roles."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.solver import (
    over_roles,
    over_thresholds,
    solve,
    solve_naive,
    solve_shared,
    threshold_grid,
)
from sglang_prfaas.scheduler.throughput import Fleet, Workload, evaluate, pd_p_bound


def test_the_case_study(fleet: Fleet, workload: Workload) -> None:
    best = solve(fleet, workload)
    assert best.t_tokens == pytest.approx(19_400, rel=0.005)
    assert (best.n_prfaas, best.n_p, best.n_d) == (4, 3, 5)
    assert best.lambda_max == pytest.approx(3.247, rel=0.002)


def test_homogeneous_and_naive(fleet: Fleet, homogeneous: Fleet, workload: Workload) -> None:
    base = solve(homogeneous, workload)
    assert (base.n_p, base.n_d, base.p) == (9, 3, 0)
    assert base.lambda_max == pytest.approx(2.11, rel=0.002)
    naive = solve_naive(fleet, workload)
    assert naive.lambda_max == pytest.approx(2.45, rel=0.01)
    assert naive.theta_pd_d == pytest.approx(6.25, rel=0.001)
    ratio = solve(fleet, workload).lambda_max / base.lambda_max
    assert ratio == pytest.approx(1.54, abs=0.005)


def test_equal_cost(fleet: Fleet, workload: Workload) -> None:
    """H200 at twice the price: the PrfaaS clusters cost 16 H20 instances."""
    same_money = solve(paper.homogeneous_fleet(16), workload)
    assert solve(fleet, workload).lambda_max / same_money.lambda_max == pytest.approx(1.152, abs=0.005)


def test_shared_roles(fleet: Fleet, homogeneous: Fleet, workload: Workload) -> None:
    shared = solve_shared(fleet, workload)
    assert shared.lambda_max == pytest.approx(3.40, rel=0.002)
    assert shared.n_p == pytest.approx(3.64, abs=0.01)
    assert shared.theta_prfaas + shared.theta_pd_p == pytest.approx(shared.theta_pd_d, rel=0.005), "eq. 8"
    assert shared.lambda_max / solve(homogeneous, workload).lambda_max == pytest.approx(1.61, abs=0.005)


def test_eq_7_holds_at_the_best_threshold(fleet: Fleet, workload: Workload) -> None:
    best = solve(fleet, workload, step_tokens=10)
    assert best.theta_prfaas / best.p == pytest.approx(best.theta_pd_p / (1 - best.p), rel=1e-3)


def test_figures_5a_and_5b(fleet: Fleet, workload: Workload) -> None:
    by_roles = over_roles(fleet, workload, 19_400)
    assert max(by_roles, key=lambda point: point.lambda_max).n_p == 3
    table = over_thresholds(fleet, workload, 3)
    inner = slice(1, -1)
    assert (table.prfaas_bound[inner][1:] >= table.prfaas_bound[inner][:-1]).all()
    falling = pd_p_bound(table, 3)[inner]
    assert (falling[1:] <= falling[:-1]).all()


@settings(max_examples=25, deadline=None)
@given(
    n_prfaas=st.integers(1, 6),
    n_pd=st.integers(2, 9),
    egress_gbps=st.floats(1.0, 50.0),
    output_tokens=st.integers(64, 4096),
)
def test_nothing_on_the_grid_is_better(n_prfaas: int, n_pd: int, egress_gbps: float, output_tokens: int) -> None:
    base = paper.case_study_fleet()
    fleet = msgspec.structs.replace(base, n_prfaas=n_prfaas, n_pd=n_pd, egress_gbps=egress_gbps)
    workload = Workload(paper.CASE_STUDY_LENGTHS, output_tokens, 40.0)
    step = 4000.0
    best = solve(fleet, workload, step)
    every = [
        evaluate(fleet, workload, t_tokens=float(t), n_p=n_p, n_d=n_pd - n_p).lambda_max
        for t in threshold_grid(fleet, workload, step)
        for n_p in range(1, n_pd)
    ]
    assert best.lambda_max == pytest.approx(max(every))
    assert solve_shared(fleet, workload, step).lambda_max >= best.lambda_max * (1 - 1e-9)


def test_a_large_fleet_is_quick(workload: Workload) -> None:
    """10,000 GPUs; the limit leaves room for a busy machine."""
    base = paper.case_study_fleet()
    fleet = msgspec.structs.replace(base, n_prfaas=417, n_pd=833, egress_gbps=10_000.0)
    start = time.perf_counter()
    best = solve(fleet, workload)
    assert time.perf_counter() - start < 1.0
    assert best.n_p + best.n_d == 833


def test_too_small_a_cluster(workload: Workload) -> None:
    with pytest.raises(ConfigError, match="cannot have 1 for prefill and 1 for decode"):
        solve(paper.homogeneous_fleet(1), workload)
