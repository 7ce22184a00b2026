"""The online correction of prefill curves."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.correction import PrefillCorrection

CURVE = paper.PAPER_PROFILE.prefill["H20"].time_s
LENGTHS = (200.0, 1_500.0, 11_000.0, 60_000.0)


def made() -> PrefillCorrection:
    return PrefillCorrection(bound=4.0, half_life_s=600.0)


def test_nothing_learnt_changes_nothing() -> None:
    curve = made().curve(CURVE, "pd")
    x = np.array(LENGTHS)
    assert [curve.at(length) for length in LENGTHS] == [CURVE.at(length) for length in LENGTHS]
    assert (curve.over(x) == CURVE.over(x)).all()


@pytest.mark.parametrize("off", [2.0, 0.5])
def test_it_converges_when_the_curve_is_off_by_two(off: float) -> None:
    random = np.random.default_rng(7)
    correction = made()
    for step in range(200):
        length = float(random.choice(LENGTHS))
        noise = float(np.exp(random.normal(0.0, 0.2)))
        correction.learn(step * 0.5, "pd", length, off * noise * CURVE.at(length), CURVE.at(length))
    curve = correction.curve(CURVE, "pd")
    for length in LENGTHS:
        assert curve.at(length) == pytest.approx(off * CURVE.at(length), rel=0.12)
    assert curve.over(np.array([11_000.0]))[0] == pytest.approx(curve.at(11_000.0))
    assert correction.factor("other", 11_000.0) == 1.0, "each site has its own"


def test_it_learns_the_shape_of_the_error() -> None:
    correction = made()
    for step in range(100):
        correction.learn(step, "pd", 300.0, 3.0 * CURVE.at(300.0), CURVE.at(300.0))
        correction.learn(step, "pd", 30_000.0, 1.0 * CURVE.at(30_000.0), CURVE.at(30_000.0))
    assert correction.factor("pd", 300.0) == pytest.approx(3.0, rel=0.2)
    assert correction.factor("pd", 30_000.0) == pytest.approx(1.0, abs=0.1)
    between = [correction.factor("pd", float(2**power)) for power in np.arange(4.0, 20.0, 0.25)]
    assert max(abs(a / b - 1) for a, b in pairwise(between)) < 0.25, "no jumps"


def test_outliers_hardly_count() -> None:
    random = np.random.default_rng(3)
    correction = made()
    for step in range(300):
        stray = 100.0 if random.random() < 0.1 else 1.0
        correction.learn(step * 0.5, "pd", 8_000.0, stray * CURVE.at(8_000.0), CURVE.at(8_000.0))
        assert correction.factor("pd", 8_000.0) < 2.0
    assert correction.factor("pd", 8_000.0) == pytest.approx(1.0, abs=0.25)


def test_what_was_learnt_fades() -> None:
    correction = made()
    for step in range(50):
        correction.learn(step, "pd", 8_000.0, 2 * CURVE.at(8_000.0), CURVE.at(8_000.0))
    learnt = correction.factor("pd", 8_000.0)
    correction.fade(600.0 * 4)
    half = correction.factor("pd", 8_000.0)
    correction.fade(600.0 * 30)
    assert learnt > half > correction.factor("pd", 8_000.0)
    assert correction.factor("pd", 8_000.0) == pytest.approx(1.0, abs=0.01)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(-1, 1e7), st.floats(0, 1e9), st.floats(0, 1e3)),
        max_size=60,
    )
)
def test_factors_stay_within_the_bound(seen: list[tuple[float, float, float, float]]) -> None:
    correction = made()
    for now_s, tokens, measured_s, profile_s in seen:
        correction.learn(now_s, "pd", tokens, measured_s, profile_s)
    for power in range(24):
        assert 0.25 - 1e-9 <= correction.factor("pd", 2.0**power) <= 4.0 + 1e-9
