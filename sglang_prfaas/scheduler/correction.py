"""Online correction of prefill curves: how much slower or faster than its profile each site is, by length.

A factor on T_prefill for each key (a site, or a class of servers) and each octave of lengths. Every finished prefill
gives a ratio of measured to predicted seconds; the estimate is a running mean of its logarithm, in which one
observation can move by `_CLIP` at most, so that an outlier counts as little as an ordinary miss. Evidence fades with
`half_life_s`. An octave with little evidence leans on its neighbours, then on the key as a whole, and that on the
profile as it is.
"""

from __future__ import annotations

import math

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from sglang_prfaas.scheduler.curves import TimeCurve

Floats = NDArray[np.float64]

_SHORTEST_LOG2 = 4  # lengths up to 2^4 and beyond 2^20 share the first and the last octave
_OCTAVES = 17
_CLIP = math.log(2.0)
_FULL_WEIGHT = 30.0  # observations that the running mean spans
_PROFILE_WEIGHT = 3.0  # observations that the profile counts as, against the key as a whole
_KEY_WEIGHT = 1.5  # observations that the key as a whole counts as, against its octaves
_COMPUTE_S = 0.2  # how often factors follow what is learnt
_SPREAD = 6.0 ** -np.abs(np.subtract.outer(np.arange(_OCTAVES), np.arange(_OCTAVES)))  # what octaves say of others


class _Mean(Struct):
    """A running mean of clipped residuals, whose weight fades."""

    log: float = 0.0
    weight: float = 0.0
    seen_s: float = 0.0

    def faded(self, now_s: float, half_life_s: float) -> float:
        """The weight that is left."""
        return self.weight * math.exp2(-max(0.0, now_s - self.seen_s) / half_life_s)

    def add(self, now_s: float, log_ratio: float, start: float, half_life_s: float) -> None:
        """Count an observation; `start` is what is believed without any."""
        weight = self.faded(now_s, half_life_s)
        if not self.weight:
            self.log = start
        self.log += max(-_CLIP, min(_CLIP, log_ratio - self.log)) / (weight + 1.0)
        self.weight = min(weight + 1.0, _FULL_WEIGHT)
        self.seen_s = now_s


class _Key:
    """The estimates of one site."""

    def __init__(self) -> None:
        self.whole = _Mean()
        self.octaves = [_Mean() for _ in range(_OCTAVES)]
        self.factors = [1.0] * _OCTAVES
        self.computed_s = float("-inf")


class PrefillCorrection:
    """Factors on T_prefill, learnt from finished prefills. Pure: the time is passed in.

    bound: factors stay within [1 / bound, bound]. half_life_s: seconds in which the evidence loses half its weight.
    """

    def __init__(self, *, bound: float, half_life_s: float) -> None:
        self._limit = math.log(bound)
        self._half_life_s = half_life_s
        self._keys: dict[str, _Key] = {}
        self._points: dict[TimeCurve, LastPoint] = {}

    def curve(self, of: TimeCurve, key: str) -> CorrectedCurve:
        """A profile's curve as corrected for one key."""
        point = self._points.get(of)
        if point is None:
            point = self._points[of] = LastPoint(of)
        return CorrectedCurve(point, self._entry(key))

    def learn(self, now_s: float, key: str, tokens: float, measured_s: float, profile_s: float) -> None:
        """One prefill of `tokens` took `measured_s`; the profile, without correction, said `profile_s`."""
        if not (measured_s > 0 and profile_s > 0):
            return
        limit = self._limit + _CLIP
        log_ratio = max(-limit, min(limit, math.log(measured_s) - math.log(profile_s)))
        entry = self._entry(key)
        octave = entry.octaves[_octave(tokens)]
        octave.add(now_s, log_ratio, entry.whole.log, self._half_life_s)
        entry.whole.add(now_s, log_ratio, 0.0, self._half_life_s)
        if now_s - entry.computed_s >= _COMPUTE_S:
            self._compute(entry, now_s)

    def factor(self, key: str, tokens: float) -> float:
        """What to multiply the profile's T_prefill with, as of the last `fade`, or a moment ago."""
        entry = self._keys.get(key)
        if entry is None:
            return 1.0
        left, share = _place(tokens)
        return entry.factors[left] * (1 - share) + entry.factors[left + 1] * share

    def fade(self, now_s: float) -> None:
        """Bring all factors to now: evidence has aged since they were last asked for."""
        for entry in self._keys.values():
            if entry.whole.weight:
                self._compute(entry, now_s)

    def table(self) -> dict[str, dict[int, float]]:
        """For each key, the factors that differ from 1 by the lowest length of their octave, for reports."""
        return {
            key: {
                1 << (index + _SHORTEST_LOG2): round(factor, 4)
                for index, factor in enumerate(entry.factors)
                if abs(factor - 1.0) > 1e-4
            }
            for key, entry in self._keys.items()
            if entry.whole.weight
        }

    def _entry(self, key: str) -> _Key:
        entry = self._keys.get(key)
        if entry is None:
            entry = self._keys[key] = _Key()
        return entry

    def _compute(self, entry: _Key, now_s: float) -> None:
        entry.computed_s = now_s
        weight = entry.whole.faded(now_s, self._half_life_s)
        whole = entry.whole.log * weight / (weight + _PROFILE_WEIGHT)
        weights = np.array([octave.faded(now_s, self._half_life_s) for octave in entry.octaves])
        logs = np.array([octave.log for octave in entry.octaves])
        mixed = (_SPREAD @ (weights * logs) + _KEY_WEIGHT * whole) / (_SPREAD @ weights + _KEY_WEIGHT)
        entry.factors = np.exp(np.clip(mixed, -self._limit, self._limit)).tolist()


class LastPoint:
    """The point of a curve that was read last: for one request, all sites of a hardware mostly read the same."""

    def __init__(self, curve: TimeCurve) -> None:
        self.curve = curve
        self.read(0.0)

    def read(self, x: float) -> None:
        """y at x, and where x is among the octaves."""
        self.x, self.y = x, self.curve.at(x)
        self.left, self.share = _place(x)


class CorrectedCurve:
    """A profile's curve times the correction of one key; read like a `Curve`. Of `PrefillCorrection.curve`."""

    def __init__(self, point: LastPoint, entry: _Key) -> None:
        self._point, self._entry = point, entry

    def at(self, x: float) -> float:
        """y at one x."""
        point, factors = self._point, self._entry.factors
        if x != point.x:
            point.read(x)
        left, share = point.left, point.share
        return point.y * (factors[left] * (1 - share) + factors[left + 1] * share)

    def over(self, x: Floats) -> Floats:
        """y at every x; [N] -> [N]."""
        places = np.log2(np.maximum(1.0, x)) - _SHORTEST_LOG2 - 0.5
        factors = np.interp(places, np.arange(_OCTAVES), self._entry.factors)
        return np.asarray(self._point.curve.over(x) * factors, dtype=np.float64)


def _place(tokens: float) -> tuple[int, float]:
    """Between which octaves a length is, the middle of an octave having its own factor: the left one, the share of the
    right one."""
    place = math.log2(max(1.0, tokens)) - _SHORTEST_LOG2 - 0.5
    left = min(_OCTAVES - 2, max(0, int(place)))
    return left, min(1.0, max(0.0, place - left))


def _octave(tokens: float) -> int:
    return max(0, min(_OCTAVES - 1, int(math.log2(max(1.0, tokens))) - _SHORTEST_LOG2))
