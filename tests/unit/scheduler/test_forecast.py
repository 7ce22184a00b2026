"""Forecasts of load, and whether a link has room."""

from __future__ import annotations

import pytest

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.bandwidth import LinkRoom
from sglang_prfaas.scheduler.forecast import SeasonalForecast

HOUR_S = 3600.0


def day(hour: int) -> float:
    return 10.0 if 9 <= hour % 24 < 18 else 1.0


def test_without_history_it_is_the_recent_mean() -> None:
    forecast = SeasonalForecast()
    assert forecast.at(0.0) == 0.0
    for minute in range(120):
        forecast.observe(minute * 60.0, 2.0 if minute < 60 else 4.0)
    assert forecast.at(7200.0) == pytest.approx(4.0, rel=0.01)


def test_days_repeat() -> None:
    forecast = SeasonalForecast()
    for hour in range(72):
        for minute in range(0, 60, 5):
            forecast.observe(hour * HOUR_S + minute * 60.0, day(hour))
    now_s = 72 * HOUR_S + 8 * HOUR_S
    for hour in range(72, 80):
        forecast.observe(hour * HOUR_S, day(hour))
    assert forecast.at(now_s + HOUR_S) == pytest.approx(10.0), "the morning comes"
    assert forecast.at(now_s) == pytest.approx(1.0)
    assert forecast.peak(now_s, 1800.0) == pytest.approx(1.0)
    assert forecast.peak(now_s, 2 * HOUR_S) == pytest.approx(10.0)


def test_days_that_no_longer_repeat() -> None:
    forecast = SeasonalForecast()
    for hour in range(100):
        for minute in range(0, 60, 5):
            forecast.observe(hour * HOUR_S + minute * 60.0, day(hour) if hour < 72 else 5.0)
    assert forecast.at(105 * HOUR_S) == pytest.approx(5.0, rel=0.05)


def test_a_period_of_nothing() -> None:
    with pytest.raises(ConfigError, match="must be positive"):
        SeasonalForecast(period_s=0.0)


def test_a_link_has_room_until_it_is_used() -> None:
    room = LinkRoom()

    def ample(now_s: float, sent: float, backlog: float = 0.0, capacity: float = 100.0) -> bool:
        return room.ample(now_s, capacity_bytes_per_s=capacity, sent_bytes=sent, backlog_bytes=backlog)

    assert ample(0.0, 0.0)
    assert ample(5.0, 250.0), "half of it"
    assert not ample(10.0, 600.0), "70 %"
    assert not ample(15.0, 850.0), "50 %: not yet ample again"
    assert ample(20.0, 950.0)
    assert not ample(20.1, 950.0, backlog=30.0)
    assert not ample(20.2, 950.0, capacity=0.0)
