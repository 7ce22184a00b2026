"""From samples to figures and curves. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from msgspec import Struct, structs

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.core.units import bytes_per_s_to_gbps
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.profiles import MeasuredPoint

OUTLIER_DEVIATIONS = 5.0
"""Median absolute deviations from the median (scaled to a normal's sigma) beyond which a sample is an outlier ..."""
OUTLIER_SHARE = 0.2
"""... if it is also this share of the median away from it."""
NOISY_SHARE = 0.3
"""Spread over median from which a point is called noisy."""
QUADRATIC_RESIDUAL = 0.08
"""Largest relative distance of a point from the parabola for which the parabola is taken."""
LAYOUT_TOLERANCE = 0.02
"""Relative difference up to which bytes moved agree with a layout."""
_SIGMA = 1.4826


class Transfer(Struct, frozen=True, kw_only=True):
    """One transfer between two servers, all ranks together."""

    tokens: int
    bytes: int
    transfer_s: float
    """From the first byte to the last."""


class Round(Struct, frozen=True, kw_only=True):
    """Transfers of one length that were asked for at once."""

    tokens: int
    at_once: int
    bytes: int
    busy_s: float
    """In which at least one of them was under way."""


def geometric(low: int, high: int, factor: float = 2.0) -> list[int]:
    """low, low * factor, ..., ending with high. Raises ValueError where low is above high."""
    if not 0 < low <= high or factor <= 1:
        raise ValueError(f"no grid from {low} to {high} by {factor}")
    found, value = [], float(low)
    while round(value) < high:
        if round(value) not in found:
            found.append(round(value))
        value *= factor
    if len(found) > 1 and high < found[-1] * factor**0.25:
        found.pop()  # a last step that is hardly one
    return [*found, high]


def summarise(x: float, samples: Sequence[float], context_tokens: int = 0) -> MeasuredPoint:
    """Median and spread of samples (seconds; at least one), outliers left out where there are three or more."""
    kept = list(samples)
    if len(kept) >= 3:
        middle = statistics.median(kept)
        deviation = _SIGMA * statistics.median(abs(sample - middle) for sample in kept)
        limit = max(OUTLIER_DEVIATIONS * deviation, OUTLIER_SHARE * middle)
        kept = [sample for sample in kept if abs(sample - middle) <= limit]
    return MeasuredPoint(
        x=float(x),
        median_s=statistics.median(kept),
        spread_s=max(kept) - min(kept),
        repeats=len(kept),
        outliers=len(samples) - len(kept),
        context_tokens=context_tokens,
    )


def noisy(points: Iterable[MeasuredPoint]) -> list[MeasuredPoint]:
    """Points whose repeats differ much."""
    return [point for point in points if point.spread_s > NOISY_SHARE * point.median_s]


def rising(values: Sequence[float]) -> list[float]:
    """The closest (least squares) values that never fall: pool adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def prefill_curve(points: Sequence[MeasuredPoint]) -> Curve:
    """T_prefill(l) through medians: one parabola where it rises everywhere and meets every point, else lines."""
    x = tuple(point.x for point in points)
    y = tuple(rising([point.median_s for point in points]))
    if len(x) >= 3:
        curve = Curve(x, y, "quadratic")
        a, b, c = curve.coefficients
        fitted = curve.over(np.array(x))
        if min(a, b, c) >= 0 and np.max(np.abs(fitted / np.array(y) - 1)) <= QUADRATIC_RESIDUAL:
            return curve
    return Curve(x, y)


def step_curve(points: Sequence[MeasuredPoint]) -> Curve:
    """Step time over the batch, of the longest context among the points."""
    longest = max(point.context_tokens for point in points)
    chosen = [point for point in points if point.context_tokens == longest]
    return Curve(tuple(point.x for point in chosen), tuple(rising([point.median_s for point in chosen])))


def kv_layout(moved: Mapping[int, float], config: KvLayout | None) -> tuple[KvLayout | None, str]:
    """The layout to go by, and why. moved: bytes of one request by its tokens; config: from config.json.

    None where neither says enough.
    """
    if config is not None and not moved:
        return config, "from config.json; no transfer was seen, so it is not checked"
    if config is not None:
        ratios = [size / config.size_bytes(tokens) for tokens, size in moved.items()]
        if max(abs(ratio - 1) for ratio in ratios) <= LAYOUT_TOLERANCE:
            return config, "from config.json; the bytes moved agree"
        if config.window_tokens:
            scale = statistics.median(ratios)
            return _scaled(config, scale), f"from config.json, times {scale:.3f}: what was moved"
    if len(moved) >= 2:
        tokens, sizes = np.array(list(moved), dtype=np.float64), np.array(list(moved.values()), dtype=np.float64)
        slope, state = np.polyfit(tokens / tokens.max(), sizes, 1)
        layout = KvLayout(full_bytes_per_token=float(slope / tokens.max()), state_bytes=max(0.0, float(state)))
        why = "config.json says nothing of it" if config is None else f"config.json gives {_described(config)}"
        return layout, f"line through the bytes moved; {why}"
    if config is not None:
        return config, "from config.json; the bytes moved differ, and a second length is needed to go by them"
    return None, "config.json does not say it, and it takes transfers of two lengths to measure it"


def busy_s(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of these spans, each from a time to a later one, lasted."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


class LinkRate(Struct, frozen=True, kw_only=True):
    """What a link carried at best. at_once: of how many transfers of `tokens` tokens."""

    gbps: float
    tokens: int
    at_once: int


def link_rate(transfers: Sequence[Transfer], rounds: Sequence[Round] = ()) -> LinkRate:
    """The highest median rate of a length, of one transfer or of several at once. Raises ValueError without any that
    took time."""
    rates: dict[tuple[int, int], list[float]] = {}
    for transfer in transfers:
        if transfer.transfer_s > 0:
            rates.setdefault((transfer.tokens, 1), []).append(transfer.bytes / transfer.transfer_s)
    for one in rounds:
        if one.busy_s > 0:
            rates.setdefault((one.tokens, one.at_once), []).append(one.bytes / one.busy_s)
    rate, (tokens, at_once) = max((statistics.median(found), key) for key, found in rates.items())
    return LinkRate(gbps=bytes_per_s_to_gbps(rate), tokens=tokens, at_once=at_once)


def bytes_by_tokens(transfers: Iterable[Transfer]) -> dict[int, float]:
    """Median bytes of the transfers of each length."""
    sizes: dict[int, list[int]] = {}
    for transfer in transfers:
        sizes.setdefault(transfer.tokens, []).append(transfer.bytes)
    return {tokens: float(statistics.median(found)) for tokens, found in sorted(sizes.items())}


def _scaled(layout: KvLayout, factor: float) -> KvLayout:
    return structs.replace(
        layout,
        full_bytes_per_token=layout.full_bytes_per_token * factor,
        window_bytes_per_token=layout.window_bytes_per_token * factor,
        state_bytes=layout.state_bytes * factor,
    )


def _described(layout: KvLayout) -> str:
    return f"{layout.full_bytes_per_token:.0f} B/token and {layout.state_bytes:.0f} B of state"
