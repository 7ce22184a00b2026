"""A measured curve: points, and a stated way to read between them."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from sglang_prfaas.errors import ConfigError

Interpolation = Literal["linear", "quadratic"]
Floats = NDArray[np.float64]
_TINY = float(np.finfo(float).tiny)


class TimeCurve(Protocol):
    """Seconds over tokens: a profile's curve, or one that is corrected."""

    def at(self, x: float) -> float:
        """y at one x."""

    def over(self, x: Floats) -> Floats:
        """y at every x; [N] -> [N]."""


class Curve(Struct, frozen=True, dict=True):
    """y over x, both positive and x strictly rising.

    `linear`: straight lines between the points; beyond them the first and the last line go on. `quadratic`: one
    least-squares parabola through all points, for prefill times, whose attention part grows with the square of the
    length. Values never fall below the smallest positive float, so that a rate can be taken of them.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or not self.x:
            raise ConfigError(f"curve: {len(self.x)} values of x, {len(self.y)} of y; both need the same, at least one")
        if any(b <= a for a, b in zip(self.x, self.x[1:], strict=False)):
            raise ConfigError(f"curve: x must rise from point to point, got {list(self.x)}")
        if min(self.y) < 0 or not all(np.isfinite((*self.x, *self.y))):
            raise ConfigError(f"curve: values must be finite and not negative, got {list(self.y)}")
        if self.interpolation == "quadratic" and len(self.x) < 3:
            raise ConfigError(f"curve: a quadratic needs three points, got {len(self.x)}; use linear")

    @cached_property
    def coefficients(self) -> tuple[float, float, float]:
        """a, b, c of a + b x + c x^2, where the interpolation is quadratic."""
        scale = self.x[-1]
        c, b, a = np.polyfit(np.array(self.x) / scale, np.array(self.y), 2)
        return float(a), float(b / scale), float(c / scale**2)

    def at(self, x: float) -> float:
        """y at one x."""
        if self.interpolation == "quadratic":
            a, b, c = self.coefficients
            return max(a + x * (b + c * x), _TINY)
        xs, ys = self.x, self.y
        if len(xs) == 1:
            return max(ys[0], _TINY)
        left = min(max(bisect_right(xs, x) - 1, 0), len(xs) - 2)
        return max(ys[left] + (ys[left + 1] - ys[left]) / (xs[left + 1] - xs[left]) * (x - xs[left]), _TINY)

    def over(self, x: Floats) -> Floats:
        """y at every x; [N] -> [N]."""
        if self.interpolation == "quadratic":
            a, b, c = self.coefficients
            y = a + x * (b + c * x)
        elif len(self.x) == 1:
            y = np.full_like(x, self.y[0], dtype=np.float64)
        else:
            xs, ys = np.array(self.x), np.array(self.y)
            left = np.clip(np.searchsorted(xs, x, side="right") - 1, 0, len(xs) - 2)
            slope = (ys[left + 1] - ys[left]) / (xs[left + 1] - xs[left])
            y = ys[left] + slope * (x - xs[left])
        return np.asarray(np.maximum(y, _TINY), dtype=np.float64)
