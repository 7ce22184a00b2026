"""Samples to figures and curves."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.profiler.summary import (
    Round,
    Transfer,
    busy_s,
    bytes_by_tokens,
    geometric,
    kv_layout,
    link_rate,
    noisy,
    prefill_curve,
    rising,
    step_curve,
    summarise,
)
from sglang_prfaas.scheduler.profiles import MeasuredPoint


def point(x: float, seconds: float, context: int = 0) -> MeasuredPoint:
    return MeasuredPoint(x=x, median_s=seconds, spread_s=0.0, repeats=3, context_tokens=context)


def test_a_grid_ends_with_its_highest_value() -> None:
    assert geometric(1, 8) == [1, 2, 4, 8]
    assert geometric(512, 20_000) == [512, 1024, 2048, 4096, 8192, 16384, 20_000]
    assert geometric(512, 2100) == [512, 1024, 2100]  # 2048 and 2100 would be hardly two lengths
    assert geometric(7, 7) == [7]
    with pytest.raises(ValueError, match="no grid from 9 to 8"):
        geometric(9, 8)


@given(st.integers(1, 10_000), st.integers(0, 200_000), st.floats(1.1, 4))
def test_grids_rise(low: int, more: int, factor: float) -> None:
    found = geometric(low, low + more, factor)
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (low, low + more) or len(found) == 1 or found[-1] == low + more


def test_outliers_are_left_out() -> None:
    found = summarise(1000, [1.0, 1.02, 0.98, 1.01, 9.0])
    assert found.median_s == pytest.approx(1.005)
    assert found.spread_s == pytest.approx(0.04)
    assert (found.repeats, found.outliers) == (4, 1)
    assert not noisy([found])


def test_a_wide_spread_is_no_outlier_but_noise() -> None:
    found = summarise(1000, [1.0, 1.4, 1.8, 2.2])
    assert (found.repeats, found.outliers) == (4, 0)
    assert noisy([found]) == [found]


def test_two_samples_are_both_kept() -> None:
    assert summarise(1, [1.0, 5.0]).repeats == 2


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30))
def test_few_samples_never_all_go(samples: list[float]) -> None:
    found = summarise(1, samples)
    assert found.repeats >= 1
    assert found.repeats + found.outliers == len(samples)
    assert min(samples) <= found.median_s <= max(samples)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=30))
def test_rising_values_rise_and_keep_their_sum(values: list[float]) -> None:
    found = rising(values)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(found))
    assert sum(found) == pytest.approx(sum(values))


def test_values_that_rise_stay_as_they_are() -> None:
    assert rising([1.0, 2.0, 2.0, 5.0]) == [1.0, 2.0, 2.0, 5.0]
    assert rising([1.0, 3.0, 2.0]) == [1.0, 2.5, 2.5]


def test_a_parabola_where_it_fits() -> None:
    curve = prefill_curve([point(n, 0.4 + 4e-5 * n + 1e-10 * n * n) for n in (1000, 8000, 32_000, 128_000)])
    assert curve.interpolation == "quadratic"
    assert curve.at(64_000) == pytest.approx(0.4 + 2.56 + 0.4096)


@pytest.mark.parametrize(
    "seconds",
    [(0.1, 0.1, 0.4, 9.0), (1.0, 1.5, 1.8, 1.9)],
    ids=["too far from one", "bent the other way"],
)
def test_lines_where_it_does_not(seconds: tuple[float, ...]) -> None:
    curve = prefill_curve([point(n, y) for n, y in zip((1000, 2000, 4000, 8000), seconds, strict=True)])
    assert curve.interpolation == "linear"
    assert curve.at(2000) == pytest.approx(seconds[1])


def test_one_length_is_a_curve() -> None:
    assert prefill_curve([point(1000, 0.5)]).at(9) == 0.5


def test_the_step_curve_is_of_the_longest_context() -> None:
    curve = step_curve([point(1, 0.01, 100), point(4, 0.02, 100), point(1, 0.03, 900), point(4, 0.04, 900)])
    assert (curve.x, curve.y) == ((1.0, 4.0), (0.03, 0.04))


def test_bytes_moved_confirm_the_config() -> None:
    config = KvLayout(full_bytes_per_token=1000, state_bytes=5000)
    assert kv_layout({100: 105_000, 900: 906_000}, config) == (config, "from config.json; the bytes moved agree")
    assert kv_layout({}, config)[0] == config


def test_bytes_moved_win_over_the_config() -> None:
    config = KvLayout(full_bytes_per_token=1000, state_bytes=5000)
    layout, why = kv_layout({100: 210_000, 900: 1_810_000}, config)
    assert layout is not None
    assert layout.full_bytes_per_token == pytest.approx(2000)
    assert layout.state_bytes == pytest.approx(10_000)
    assert why == "line through the bytes moved; config.json gives 1000 B/token and 5000 B of state"
    assert kv_layout({100: 210_000}, config)[0] == config


def test_a_window_is_scaled() -> None:
    config = KvLayout(full_bytes_per_token=100, window_bytes_per_token=50, window_tokens=64)
    layout, why = kv_layout({n: 2 * config.size_bytes(n) for n in (32, 640)}, config)
    assert layout == KvLayout(full_bytes_per_token=200, window_bytes_per_token=100, window_tokens=64)
    assert "times 2.000" in why


def test_an_unknown_model_takes_two_lengths() -> None:
    layout, _ = kv_layout({100: 150_000, 200: 250_000}, None)
    assert layout is not None
    assert layout.size_bytes(1000) == pytest.approx(1_050_000)
    assert kv_layout({100: 150_000}, None)[0] is None


def test_the_link_is_the_fastest_length() -> None:
    transfers = [Transfer(tokens=n, bytes=n * 1000, transfer_s=s) for n, s in ((100, 1e-3), (100, 3e-3), (900, 1e-3))]
    best = link_rate(transfers)
    assert best.gbps == pytest.approx(7.2)
    assert (best.tokens, best.at_once) == (900, 1)
    assert bytes_by_tokens(transfers) == {100: 100_000, 900: 900_000}


def test_several_transfers_at_once_may_carry_more() -> None:
    alone = [Transfer(tokens=100, bytes=100_000, transfer_s=1e-3)]
    rounds = [Round(tokens=100, at_once=4, bytes=400_000, busy_s=s) for s in (1e-3, 2e-3, 5e-3)]
    best = link_rate(alone, rounds)
    assert best.gbps == pytest.approx(1.6)
    assert (best.tokens, best.at_once) == (100, 4)
    assert link_rate(alone, rounds[2:]).at_once == 1


def test_busy_is_the_union_of_spans() -> None:
    assert busy_s([]) == 0.0
    assert busy_s([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == pytest.approx(4.0)
