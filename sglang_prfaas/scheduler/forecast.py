"""What a load will be in a while: as it was at this time of the day, where that has proved right, else as of late."""

from __future__ import annotations

import math

from sglang_prfaas.errors import ConfigError


class SeasonalForecast:
    """Seasonal-naive over the parts of a period, with an exponentially weighted mean to fall back on. Pure.

    Both are scored on every value before it is learned, and the one with the smaller recent error is used. A part of
    the period that was not seen yet has no seasonal forecast.
    """

    def __init__(self, *, period_s: float = 86_400.0, parts: int = 24, half_life_s: float = 300.0) -> None:
        """`half_life_s`: of the mean and of the errors. Raises ConfigError for a period that cannot be divided."""
        if not (period_s > 0 and parts > 0 and half_life_s > 0):
            raise ConfigError(
                f"forecast: period {period_s} s, {parts} parts, half-life {half_life_s} s must be positive"
            )
        self._period_s, self._parts, self._half_life_s = period_s, parts, half_life_s
        self._last: dict[int, float] = {}
        """Mean of each part in the last period that had it."""
        self._part, self._sum, self._count = -1, 0.0, 0
        self._mean = self._seen_s = 0.0
        self._error = {"seasonal": math.inf, "mean": math.inf}

    def observe(self, now_s: float, value: float) -> None:
        """Learn the value of the interval that ends now. Times must not go back."""
        weight = 1.0 if self._count == 0 and not self._last else 1 - 0.5 ** ((now_s - self._seen_s) / self._half_life_s)
        part = self._part_of(now_s)
        if part in self._last:
            self._score("seasonal", abs(value - self._last[part]), weight)
        if weight < 1:
            self._score("mean", abs(value - self._mean), weight)
        self._mean += weight * (value - self._mean)
        self._seen_s = now_s
        if part != self._part:
            if self._count:
                self._last[self._part] = self._sum / self._count
            self._part, self._sum, self._count = part, 0.0, 0
        self._sum += value
        self._count += 1

    def at(self, at_s: float) -> float:
        """The value to expect then."""
        seasonal = self._last.get(self._part_of(at_s))
        if seasonal is not None and self._error["seasonal"] <= self._error["mean"]:
            return seasonal
        return self._mean

    def peak(self, now_s: float, horizon_s: float) -> float:
        """The largest value to expect from now to the horizon."""
        step_s = self._period_s / self._parts
        steps = min(self._parts, math.ceil(horizon_s / step_s))
        return max(self.at(now_s + min(horizon_s, step * step_s)) for step in range(steps + 1))

    def _score(self, name: str, error: float, weight: float) -> None:
        old = self._error[name]
        self._error[name] = error if math.isinf(old) else old + weight * (error - old)

    def _part_of(self, at_s: float) -> int:
        return int(at_s % self._period_s / self._period_s * self._parts)
