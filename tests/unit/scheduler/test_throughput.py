"""Curves, lengths and eq. 1 to 6, against what the paper prints and what follows from it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.lengths import Empirical, TruncatedLogNormal, nodes
from sglang_prfaas.scheduler.profiles import ProfileFile, load_profile, save_profile
from sglang_prfaas.scheduler.throughput import (
    Fleet,
    Workload,
    cluster_egress_gbps,
    evaluate,
    kv_throughput_gbps,
)

T = np.array([19_400.0])


def test_curve_of_h200_is_the_least_squares_fit_of_table_5() -> None:
    a, b, c = paper.PAPER_PROFILE.prefill["H200"].time_s.coefficients
    assert a == pytest.approx(0.3891, abs=1e-4)
    assert b == pytest.approx(4.2055e-5, rel=1e-4)
    assert c == pytest.approx(9.936e-11, rel=1e-3)


def test_curve_of_h20_passes_its_anchors() -> None:
    curve = paper.PAPER_PROFILE.prefill["H20"].time_s
    for tokens, seconds in paper.H20_ANCHORS:
        assert curve.at(tokens) == pytest.approx(seconds)
    assert curve.at(10_200) == pytest.approx(3 / 1.64, rel=0.005)
    assert curve.at(27_500) == pytest.approx(9 / 2.11, rel=0.005)


def test_linear_curve_goes_on_beyond_its_points() -> None:
    curve = Curve((10.0, 20.0, 40.0), (1.0, 3.0, 4.0))
    assert [curve.at(x) for x in (10, 15, 20, 30, 40, 60)] == pytest.approx([1, 2, 3, 3.5, 4, 5])
    assert curve.at(5) == pytest.approx(0, abs=1e-9)
    assert Curve((20.0,), (0.025,)).at(3) == 0.025


@pytest.mark.parametrize(
    ("x", "y", "kind", "message"),
    [
        ((1.0, 1.0), (1.0, 2.0), "linear", "must rise"),
        ((1.0,), (1.0, 2.0), "linear", "both need the same"),
        ((1.0, 2.0), (1.0, -2.0), "linear", "not negative"),
        ((1.0, 2.0), (1.0, 2.0), "quadratic", "three points"),
    ],
)
def test_wrong_curves_are_refused(x: tuple[float, ...], y: tuple[float, ...], kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Curve(x, y, "quadratic" if kind == "quadratic" else "linear")


def test_lengths_of_the_case_study() -> None:
    split = paper.CASE_STUDY_LENGTHS.split(T)
    assert split.p[0] == pytest.approx(0.496, abs=0.001)
    assert split.l_long[0] == pytest.approx(45_000, rel=0.002)
    assert split.l_short[0] == pytest.approx(10_200, rel=0.003)
    assert paper.CASE_STUDY_LENGTHS.mean == pytest.approx(27_500, rel=0.001)
    assert paper.CASE_STUDY_LENGTHS.quantiles(np.array([0.9]))[0] == pytest.approx(62_300, rel=0.002)


def test_closed_forms_agree_with_numerical_integration() -> None:
    lengths = TruncatedLogNormal(8.0, 1.3, 100.0, 50_000.0)
    x = np.linspace(100.0, 50_000.0, 400_001)
    density = np.exp(-((np.log(x) - 8.0) ** 2) / (2 * 1.3**2)) / x
    for t in (200.0, 3_000.0, 20_000.0):
        split = lengths.split(np.array([t]))
        above = x > t
        assert split.p[0] == pytest.approx(density[above].sum() / density.sum(), abs=1e-3)
        assert split.l_long[0] == pytest.approx((x * density)[above].sum() / density[above].sum(), rel=1e-3)
        assert split.l_short[0] == pytest.approx((x * density)[~above].sum() / density[~above].sum(), rel=5e-3)


def test_an_empirical_sample_of_a_distribution_agrees_with_it() -> None:
    sample = Empirical(nodes(paper.CASE_STUDY_LENGTHS, 20_000))
    exact, found = paper.CASE_STUDY_LENGTHS.split(T), sample.split(T)
    assert found.p[0] == pytest.approx(exact.p[0], abs=1e-3)
    assert found.l_long[0] == pytest.approx(exact.l_long[0], rel=2e-3)
    assert found.l_short[0] == pytest.approx(exact.l_short[0], rel=2e-3)
    assert sample.mean == pytest.approx(paper.CASE_STUDY_LENGTHS.mean, rel=2e-3)


def test_thresholds_outside_of_the_lengths() -> None:
    for lengths in (paper.CASE_STUDY_LENGTHS, Empirical(np.array([5.0, 7.0, 9.0]))):
        split = lengths.split(np.array([0.0, 1e9]))
        assert split.p.tolist() == [1.0, 0.0]
        assert split.l_long[0] == pytest.approx(lengths.mean)
        assert split.l_short[1] == pytest.approx(lengths.mean)


def test_size_model_against_table_5() -> None:
    kv = paper.PAPER_PROFILE.kv
    for tokens, mib in ((1024, 190.8), (8192, 308.9)):
        assert kv.size_bytes(tokens) / 2**20 == pytest.approx(mib, abs=0.05)
    for row in paper.TABLE5:
        assert kv.size_bytes(row.tokens) / 2**20 == pytest.approx(row.kv_mib, rel=0.02)
    assert kv.state_bytes / kv.size_bytes(1024) == pytest.approx(0.91, abs=0.005)


@pytest.mark.parametrize("row", paper.TABLE5, ids=lambda row: f"{row.tokens}")
def test_kv_throughput_of_table_5(row: paper.Table5Row) -> None:
    """Eq. 1 over the paper's own sizes and times; both are printed with two or three digits."""
    assert kv_throughput_gbps(row.kv_mib * 2**20, row.prefill_s) == pytest.approx(row.kv_gbps, rel=0.012)


@pytest.mark.parametrize("entry", paper.SECTION_2_3, ids=lambda entry: entry.printed)
def test_bandwidths_of_section_2_3(entry: paper.ClusterBandwidth) -> None:
    instance = paper.TABLE3_GBPS[entry.model][paper.TABLE3_LENGTHS.index(entry.length_k)]
    assert cluster_egress_gbps(entry.gpus, 8, instance) == pytest.approx(entry.gbps, rel=0.03)
    assert cluster_egress_gbps(512, 8, paper.TABLE3_GBPS["Ring-2.5-1T"][3]) < 100


def test_table_6_at_the_papers_own_point(fleet: Fleet, workload: Workload) -> None:
    found = evaluate(fleet, workload, t_tokens=19_400, n_p=3, n_d=5)
    assert found.theta_prfaas == pytest.approx(1.61, rel=0.005)
    assert found.theta_pd_p == pytest.approx(1.64, rel=0.005)
    assert found.theta_pd_d == pytest.approx(3.91, rel=0.002)
    assert found.lambda_max == pytest.approx(3.247, rel=0.002)
    assert found.p == pytest.approx(0.496, abs=0.001)
    assert 12 < found.egress_gbps < 13


def test_a_thin_link_binds(fleet: Fleet, workload: Workload) -> None:
    thin = Fleet(
        kv=fleet.kv,
        pd_prefill=fleet.pd_prefill,
        pd_decode=fleet.pd_decode,
        n_pd=8,
        prfaas_prefill=fleet.prfaas_prefill,
        n_prfaas=4,
        egress_gbps=5.0,
    )
    found = evaluate(thin, workload, t_tokens=19_400, n_p=3, n_d=5)
    assert found.binding == "prfaas_egress"
    assert found.egress_gbps == pytest.approx(5.0), "at Lambda_max the link is full"


def test_decode_batch_follows_the_slo() -> None:
    decode = paper.PAPER_PROFILE.decode["H20"]
    assert decode.batch_max(40.0) == 20
    assert decode.requests_per_s(40.0, 1024) == pytest.approx(6.25 / 8)
    with pytest.raises(ConfigError, match="no batch meets 50 tokens/s"):
        decode.batch_max(50)


def test_profiles_survive_a_file(tmp_path: Path) -> None:
    save_profile(paper.PAPER_PROFILE, tmp_path / "profile.json")
    again = load_profile(tmp_path / "profile.json")
    assert again == paper.PAPER_PROFILE
    assert isinstance(again, ProfileFile)
    with pytest.raises(ConfigError, match=r"no prefill curve of 'B300', only of \['H20', 'H200'\]"):
        again.prefill_on("B300")


def test_wrong_profiles_name_their_path(tmp_path: Path) -> None:
    path = tmp_path / "profile.toml"
    path.write_text('model = "m"\nkv = {full_bytes_per_token = "x"}\nprefill = {}\ndecode = {}\n')
    with pytest.raises(ConfigError, match=r"kv\.full_bytes_per_token"):
        load_profile(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_profile(tmp_path / "none.toml")


def test_nodes_have_equal_weight() -> None:
    assert float(np.mean(nodes(paper.CASE_STUDY_LENGTHS))) == pytest.approx(paper.CASE_STUDY_LENGTHS.mean, rel=1e-3)
    assert math.isclose(float(np.mean(nodes(paper.CASE_STUDY_LENGTHS) > 19_400)), 0.496, abs_tol=0.001)
