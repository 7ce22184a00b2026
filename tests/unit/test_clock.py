"""Clocks and deadlines."""

from __future__ import annotations

import pytest

from sglang_prfaas.clock import Deadline, MonotonicClock, VirtualClock


def test_a_deadline_on_a_virtual_clock() -> None:
    clock = VirtualClock(5.0)
    deadline = Deadline(clock, 2.0)
    assert deadline.remaining_s() == 2.0
    seen = []
    for step_s in (1.5, 1.0):
        clock.advance(step_s)
        seen.append((deadline.expired, deadline.remaining_s()))
    assert seen == [(False, pytest.approx(0.5)), (True, 0.0)]


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="cannot go back"):
        VirtualClock().advance(-1.0)
    clock = MonotonicClock()
    assert clock.now_s() <= clock.now_s()
