"""Several sites, and the linear program below."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.linear_program import maximise_sum
from sglang_prfaas.scheduler.multi_site import PdSite, PrfaasSite, SitesPlan, solve_sites
from sglang_prfaas.scheduler.solver import solve
from sglang_prfaas.scheduler.throughput import Fleet, Workload

PROFILE = paper.PAPER_PROFILE


def pd_site(name: str, instances: int = 8, share: float = 1.0) -> PdSite:
    return PdSite(
        name=name,
        prefill=PROFILE.prefill["H20"],
        decode=PROFILE.decode["H20"],
        instances=instances,
        workload=paper.case_study_workload(),
        share=share,
    )


def prfaas_site(name: str, instances: int = 4, egress_gbps: float = float("inf"), **links: float) -> PrfaasSite:
    return PrfaasSite(
        name=name, prefill=PROFILE.prefill["H200"], instances=instances, links_gbps=links, egress_gbps=egress_gbps
    )


def solved(pd: list[PdSite], prfaas: list[PrfaasSite]) -> SitesPlan:
    return solve_sites(PROFILE.kv, pd, prfaas)


def test_one_pair_is_the_case_study(fleet: Fleet, workload: Workload) -> None:
    found = solved([pd_site("pd")], [prfaas_site("far", pd=100.0)])
    best = solve(fleet, workload)
    assert found.lambda_max == pytest.approx(best.lambda_max, rel=2e-3)
    (site,) = found.sites
    assert (site.n_p, site.n_d) == (3, 5)
    assert site.t_tokens == pytest.approx(19_400, abs=200)
    assert site.egress_gbps["far"] == pytest.approx(best.egress_gbps, rel=5e-3)


def test_without_prfaas_it_is_the_homogeneous_cluster(homogeneous: Fleet, workload: Workload) -> None:
    found = solved([pd_site("pd", 12)], [])
    assert found.lambda_max == pytest.approx(solve(homogeneous, workload).lambda_max, rel=1e-5)


def test_two_equal_pairs_carry_twice_as_much() -> None:
    one = solved([pd_site("a")], [prfaas_site("x", a=100.0)]).lambda_max
    two = solved([pd_site("a"), pd_site("b")], [prfaas_site("x", a=100.0), prfaas_site("y", b=100.0)])
    assert two.lambda_max == pytest.approx(2 * one, rel=1e-4)
    assert two.sites[0].offloaded["y"] == 0.0, "no link"


def test_a_large_prfaas_site_serves_both() -> None:
    apart = solved([pd_site("a"), pd_site("b")], [prfaas_site("x", a=100.0), prfaas_site("y", b=100.0)])
    pooled = solved([pd_site("a"), pd_site("b")], [prfaas_site("x", 8, a=100.0, b=100.0)])
    assert pooled.lambda_max == pytest.approx(apart.lambda_max, rel=1e-4)


def test_each_link_counts_and_so_does_the_egress() -> None:
    def rate(egress_gbps: float, a: float, b: float) -> float:
        return solved([pd_site("a"), pd_site("b")], [prfaas_site("x", 8, egress_gbps, a=a, b=b)]).lambda_max

    free = rate(float("inf"), 100.0, 100.0)
    assert rate(float("inf"), 100.0, 4.0) < free * 0.95
    assert rate(10.0, 100.0, 100.0) < free * 0.95
    thin = solved([pd_site("a")], [prfaas_site("x", a=5.0)])
    assert thin.sites[0].egress_gbps["x"] <= 5.0 + 1e-6


def test_shares_are_kept() -> None:
    found = solved([pd_site("a", 8, 3.0), pd_site("b", 8, 1.0)], [prfaas_site("x", 6, a=100.0, b=100.0)])
    rates = [site.rate for site in found.sites]
    assert rates[0] == pytest.approx(3 * rates[1])


def test_sixteen_sites_and_10000_gpus_are_quick() -> None:
    pd = [pd_site(f"pd{index}", 104) for index in range(8)]
    links = {site.name: 1000.0 for site in pd}
    start = time.perf_counter()
    found = solved(pd, [prfaas_site(f"far{index}", 52, **links) for index in range(8)])
    assert time.perf_counter() - start < 5
    one = solved([pd_site("pd", 104)], [prfaas_site("far", 52, pd=1000.0)])
    assert found.lambda_max == pytest.approx(8 * one.lambda_max, rel=1e-3)


@pytest.mark.parametrize(
    ("pd", "prfaas", "message"),
    [
        ([], [], "there must be one"),
        ([pd_site("a"), pd_site("a")], [], "names of their own"),
        ([pd_site("a", 1)], [], "needs two instances"),
        ([pd_site("a")], [prfaas_site("x", b=1.0)], r"links to \['b'\], but PD sites are \['a'\]"),
    ],
)
def test_impossible_sites(pd: list[PdSite], prfaas: list[PrfaasSite], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        solved(pd, prfaas)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_linear_programs_against_their_corners(rows: int, columns: int, seed: int) -> None:
    """The optimum lies in a corner: every way to make `columns` of the limits tight is tried."""
    random = np.random.default_rng(seed)
    a = np.vstack([random.uniform(0, 3, (rows, columns)).round(1), np.eye(columns)])
    b = np.concatenate([random.uniform(0, 5, rows).round(1), np.full(columns, 10.0)])
    x = maximise_sum(a, b)
    assert (a @ x <= b + 1e-7).all()
    assert (x >= -1e-9).all()
    every, limits = np.vstack([a, -np.eye(columns)]), np.concatenate([b, np.zeros(columns)])
    best = 0.0
    for chosen in itertools.combinations(range(len(every)), columns):
        part = every[list(chosen)]
        if abs(np.linalg.det(part)) > 1e-9:
            corner = np.linalg.solve(part, limits[list(chosen)])
            if (every @ corner <= limits + 1e-7).all():
                best = max(best, float(corner.sum()))
    assert x.sum() == pytest.approx(best, abs=1e-6)


def test_programs_without_limit_or_start_are_refused() -> None:
    with pytest.raises(ValueError, match="no limit"):
        maximise_sum(np.array([[1.0, 0.0]]), np.array([1.0]))
    with pytest.raises(ValueError, match="must not be negative"):
        maximise_sum(np.array([[1.0]]), np.array([-1.0]))
