"""Distributions of uncached input lengths: what eq. 3 to 6 need of L, and quantiles and nodes for times.

`TruncatedLogNormal` is the paper's case study (section 4); `Empirical` is any sample, such as a trace or the lengths
that a router saw lately. Lengths in tokens.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from sglang_prfaas.errors import ConfigError

Floats = NDArray[np.float64]
_NORMAL = NormalDist()
_ERF = np.frompyfunc(math.erf, 1, 1)


class Split(Struct, frozen=True):
    """What a threshold makes of a distribution. Arrays over the thresholds asked for, [T]."""

    p: Floats
    """P(L > t), the offloaded share."""
    l_long: Floats
    """E[L given L > t]; t itself where nothing is longer."""
    l_short: Floats
    """E[L given L <= t]; t itself where nothing is shorter."""


class LengthDistribution(Protocol):
    """A random input length."""

    @property
    def mean(self) -> float: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    def split(self, t: Floats) -> Split: ...

    def quantiles(self, q: Floats) -> Floats: ...


def nodes(lengths: LengthDistribution, count: int = 4096) -> Floats:
    """`count` lengths of equal weight that stand for the distribution: the middles of its quantiles, rising. [count]"""
    return lengths.quantiles((np.arange(count) + 0.5) / count)


class TruncatedLogNormal(Struct, frozen=True):
    """exp of a normal with `mu` and `sigma`, given that it lies in [`low`, `high`]."""

    mu: float
    sigma: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.sigma > 0 and 0 < self.low < self.high):
            raise ConfigError(
                f"log-normal lengths: sigma {self.sigma} must be positive, and 0 < low {self.low} < high {self.high}"
            )

    @property
    def mean(self) -> float:
        return float(self.split(np.array([self.high])).l_short[0])

    def split(self, t: Floats) -> Split:
        """Closed forms: with z = (ln t - mu) / sigma, mass is Phi(z), and the first moment Phi(z - sigma) exp(...)."""
        clipped = np.clip(t, self.low, self.high)
        mass = self._cdf(clipped, 0.0)
        moment = self._cdf(clipped, self.sigma)
        mass_low, mass_high = self._cdf(np.array([self.low, self.high]), 0.0)
        moment_low, moment_high = self._cdf(np.array([self.low, self.high]), self.sigma)
        scale = math.exp(self.mu + self.sigma**2 / 2)
        with np.errstate(divide="ignore", invalid="ignore"):
            l_long = scale * (moment_high - moment) / (mass_high - mass)
            l_short = scale * (moment - moment_low) / (mass - mass_low)
        return Split(
            p=(mass_high - mass) / (mass_high - mass_low),
            l_long=np.where(mass_high > mass, l_long, clipped),
            l_short=np.where(mass > mass_low, l_short, clipped),
        )

    def quantiles(self, q: Floats) -> Floats:
        mass_low, mass_high = self._cdf(np.array([self.low, self.high]), 0.0)
        z = [
            _NORMAL.inv_cdf(mass_low + float(share) * (mass_high - mass_low)) for share in np.clip(q, 1e-12, 1 - 1e-12)
        ]
        return np.clip(np.exp(self.mu + self.sigma * np.array(z)), self.low, self.high)

    def _cdf(self, x: Floats, shift: float) -> Floats:
        z = ((np.log(x) - self.mu) / self.sigma - shift) / math.sqrt(2)
        return 0.5 * (1 + np.asarray(_ERF(z), dtype=np.float64))


class Empirical:
    """A sample of lengths, each of the same weight."""

    def __init__(self, lengths: Floats) -> None:
        """Raises ConfigError for an empty sample."""
        if len(lengths) == 0:
            raise ConfigError("a length distribution needs at least one length")
        self._sorted = np.sort(np.asarray(lengths, dtype=np.float64))
        self._sums = np.concatenate(([0.0], np.cumsum(self._sorted)))

    @property
    def mean(self) -> float:
        return float(self._sums[-1] / len(self._sorted))

    @property
    def low(self) -> float:
        return float(self._sorted[0])

    @property
    def high(self) -> float:
        return float(self._sorted[-1])

    def split(self, t: Floats) -> Split:
        count = len(self._sorted)
        shorter = np.searchsorted(self._sorted, t, side="right")
        with np.errstate(divide="ignore", invalid="ignore"):
            l_long = (self._sums[-1] - self._sums[shorter]) / (count - shorter)
            l_short = self._sums[shorter] / shorter
        return Split(
            p=(count - shorter) / count,
            l_long=np.where(shorter < count, l_long, t),
            l_short=np.where(shorter > 0, l_short, t),
        )

    def quantiles(self, q: Floats) -> Floats:
        index = np.clip((q * len(self._sorted)).astype(np.int64), 0, len(self._sorted) - 1)
        return self._sorted[index]

    def __repr__(self) -> str:
        return f"Empirical({len(self._sorted)} lengths, mean {self.mean:.0f}, {self.low:.0f} to {self.high:.0f})"
