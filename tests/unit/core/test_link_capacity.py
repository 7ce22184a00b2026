"""What is learnt of a link's capacity, and for how long it holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.core.link_capacity import GROWTH, HALF_LIFE_S, HOLD_S, WINDOW_S, LinkCapacity


def test_the_largest_of_late_counts() -> None:
    capacity = LinkCapacity(100.0)
    assert capacity.at(0.0) == 100.0
    for at_s, rate in ((0.0, 30.0), (0.1, 40.0), (0.2, 20.0)):
        capacity.filled(at_s, rate)
    assert capacity.at(0.2) == 40.0
    capacity.filled(0.15 + WINDOW_S, 20.0)
    assert capacity.at(0.7) == 20.0


def test_an_old_measurement_fades_also_where_traffic_goes_on() -> None:
    capacity = LinkCapacity(100.0)
    capacity.filled(0.0, 20.0)
    for step in range(1, 10):
        capacity.at_least(step * HOLD_S / 10, 20.0 + step)
    assert capacity.at(HOLD_S) == 29.0
    assert capacity.at(HOLD_S + HALF_LIFE_S) == pytest.approx(64.5)
    capacity.at_least(HOLD_S + HALF_LIFE_S, 70.0)
    assert capacity.at(HOLD_S + 2 * HALF_LIFE_S) == pytest.approx(85.0)


def test_without_a_configured_one_it_goes_back_to_the_best_that_was_seen() -> None:
    capacity = LinkCapacity()
    assert capacity.at(0.0) == 0.0
    capacity.filled(0.0, 500.0)
    capacity.filled(10.0, 20.0)
    assert capacity.at(10.0 + HOLD_S) == 20.0
    assert capacity.at(10.0 + HOLD_S + HALF_LIFE_S) == pytest.approx(260.0)
    assert capacity.at(1e6) == pytest.approx(500.0)


def test_one_that_was_slow_from_the_start_is_tried_again_too() -> None:
    capacity = LinkCapacity()
    capacity.filled(0.0, 20.0)
    assert capacity.at(HOLD_S) == 20.0
    assert capacity.at(HOLD_S + HALF_LIFE_S) == pytest.approx(20.0 * (1 + GROWTH) / 2)
    assert capacity.at(1e6) == pytest.approx(20.0 * GROWTH)
    capacity.filled(1e6, 21.0)
    assert capacity.at(1e6 + HOLD_S) == 21.0


@given(st.lists(st.tuples(st.floats(0, 5), st.booleans(), st.floats(0, 1e12)), max_size=50), st.floats(0, 1e12))
def test_it_stays_between_what_was_seen_and_configured(
    steps: list[tuple[float, bool, float]], configured: float
) -> None:
    capacity = LinkCapacity(configured)
    now_s, seen = 0.0, [configured]
    for step_s, filled, rate in steps:
        now_s += step_s
        (capacity.filled if filled else capacity.at_least)(now_s, rate)
        seen.append(rate)
        most = max(seen) * (1.0 if configured else GROWTH)
        assert min(seen) - 1e-3 <= capacity.at(now_s) <= most + 1e-3
        if not filled:
            assert capacity.at(now_s) >= rate - 1e-3
