from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.store.fetch_choice import (
    FORGET_HALF_LIFE_S,
    MAX_BACKOFF_S,
    PeerEstimate,
    TokensPerSecond,
    choose,
    compute_s,
)

CURVE = Curve(x=(1000, 8000, 32000, 128000), y=(0.44, 0.72, 1.84, 7.40), interpolation="quadratic")
"""Table 5 of the paper."""
GIGABIT = 1e9 / 8


def test_computing_costs_the_difference_of_the_curve() -> None:
    assert compute_s(CURVE, 8000, 128000) == pytest.approx(CURVE.at(128000) - CURVE.at(8000))
    assert compute_s(CURVE, 0, 8000) < CURVE.at(8000), "what any prefill takes is not saved"
    assert compute_s(TokensPerSecond(100.0), 50, 250) == 2.0
    assert compute_s(CURVE, 8000, 8000) == 0.0


@pytest.mark.parametrize(("gbps", "fetch"), [(0.5, False), (1.0, False), (10.0, True), (100.0, True)])
def test_a_long_prefix_of_the_paper_is_fetched_over_links_that_are_quick_enough(gbps: float, fetch: bool) -> None:
    link = PeerEstimate(gbps * GIGABIT, rtt_s=0.05)
    nbytes = round(2316.3 * 2**20)  # 128K tokens
    assert choose(link.fetch_s(nbytes, 0, 0.0), compute_s(CURVE, 0, 128000), 0.2).fetch is fetch


def test_the_margin_has_to_be_saved() -> None:
    assert choose(0.79, 1.0, 0.2).fetch
    assert not choose(0.8, 1.0, 0.2).fetch
    assert "not clearly less than 1 s" in str(choose(0.9, 1.0, 0.2))


def test_the_rate_follows_fetches_and_comes_back() -> None:
    link = PeerEstimate(GIGABIT, rtt_s=0.0)
    for second in range(8):
        link.moved(10_000_000, 1.0, float(second))
    slow = link.bytes_per_s(7.0)
    assert slow == pytest.approx(1e7, rel=0.2)
    assert slow < link.bytes_per_s(7.0 + FORGET_HALF_LIFE_S) < GIGABIT
    assert link.bytes_per_s(7.0 + 20 * FORGET_HALF_LIFE_S) == pytest.approx(GIGABIT, rel=1e-3)


def test_small_fetches_say_nothing_of_the_rate_and_waiting_ones_share_it() -> None:
    link = PeerEstimate(1e6, rtt_s=0.1)
    link.moved(1000, 0.5, 0.0)
    assert link.bytes_per_s(0.0) == 1e6
    assert link.fetch_s(500_000, 0, 0.0) == pytest.approx(0.6)
    assert link.fetch_s(500_000, 1_000_000, 0.0) == pytest.approx(1.6)


def test_the_round_trip_is_measured() -> None:
    link = PeerEstimate(1e6, rtt_s=0.0)
    for _ in range(12):
        link.answered(0.04)
    assert link.rtt_s == pytest.approx(0.04, rel=0.01)


def test_a_peer_that_fails_rests_longer_each_time_until_it_answers() -> None:
    link, now = PeerEstimate(1e6, 0.0), 0.0
    rests = []
    for _ in range(9):
        link.failed(now)
        step = next(step for step in (2**n for n in range(8)) if not link.rests(now + min(step, MAX_BACKOFF_S)))
        rests.append(step)
        assert link.rests(now)
        now += MAX_BACKOFF_S
    assert rests == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    link.answered(0.01)
    link.failed(now)
    assert not link.rests(now + 1.0)


@given(st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1e4), st.floats(0, 1e3)), min_size=1, max_size=30))
def test_any_measurements_leave_a_rate(samples: list[tuple[int, float, float]]) -> None:
    link, now = PeerEstimate(GIGABIT, 0.01), 0.0
    for nbytes, seconds, pause in samples:
        now += pause
        link.moved(nbytes, seconds, now)
        rate = link.bytes_per_s(now)
        assert math.isfinite(rate)
        assert rate > 0
