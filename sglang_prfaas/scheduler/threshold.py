"""The live threshold: solved over the lengths seen lately, then moved by the queues, the link and what is alive.

Two parts, both pure. `balanced_threshold` is eq. 7 over a sample, with the mean of T_prefill instead of T_prefill of
the mean, so that long tails count. `ThresholdController` keeps the sample and turns every observation into the t that
`short_term.decide` compares with:

    D(t) = rho D(t*) + (W_prfaas - w W_local) / (1 + d min(W)),  D(l) = T_local(l) - T_prfaas(l) - exposed transfer

D is what offloading gains a request of l tokens; W is how long either path makes it wait. Without load (rho = 0) that
is the t at which both paths give the same TTFT. At full load it is t*, whose D is the price of a place in the faster
cluster, moved by the difference of the queues. A queue, a slow link or a dead server changes W at once, and t with it.

w > 1, because a second of wait hits more and shorter requests in the local queue: under overload the long ones wait.
d > 0, because where both queues are long, a request in the wrong cluster delays all those behind it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.core.units import gbps_to_bytes_per_s
from sglang_prfaas.scheduler.curves import TimeCurve

Floats = NDArray[np.float64]
NOTHING_OFFLOADED = 1 << 40
"""A threshold that no request exceeds."""


class PathLoad(Struct, frozen=True, kw_only=True):
    """The prefill servers of one path: how many are alive, in whole servers' worth, and when the first one is free."""

    servers: float
    wait_s: float


class LiveState(Struct, frozen=True, kw_only=True):
    """What the controller needs to know of one moment."""

    now_s: float
    prfaas: PathLoad
    local: PathLoad
    link_gbps: float
    """Capacity of the link as last measured."""
    link_backlog_bytes: float = 0.0
    """KVCache that is ready and not yet sent."""


class ThresholdChoice(Struct, frozen=True):
    """A threshold and the figures behind it."""

    t_tokens: int
    t_balanced: float
    """t*, eq. 7 over the recent lengths."""
    utilisation: float
    """rho, of both prefill stages at t*."""
    reason: str


def balanced_threshold(
    lengths: Floats, local_s: Floats, prfaas_s: Floats, sizes_bytes: Floats, state: LiveState
) -> tuple[float, float]:
    """Eq. 7 over a rising sample of lengths: t*, and the busy seconds of either stage for each request at t*.

    `local_s`, `prfaas_s`, `sizes_bytes`: T_prefill on either path and S_kv of each length. Returns an infinite t* where
    no PrfaaS server or no link is left, and 0 where no local one is.
    """
    count = len(lengths)
    if state.prfaas.servers <= 0 or state.link_gbps <= 0:
        return float("inf"), float(local_s.sum()) / count / max(state.local.servers, 1e-9)
    compute = (prfaas_s.sum() - np.cumsum(prfaas_s)) / state.prfaas.servers
    egress = (sizes_bytes.sum() - np.cumsum(sizes_bytes)) / gbps_to_bytes_per_s(state.link_gbps)
    far = np.maximum(compute, egress) / count
    if state.local.servers <= 0:
        return 0.0, float(prfaas_s.sum()) / count / state.prfaas.servers
    near = np.cumsum(local_s) / state.local.servers / count
    index = min(int(np.searchsorted(near - far, 0.0)), count - 1)  # near rises, far falls
    return float(lengths[index]), float(max(near[index], far[index]))


class ThresholdController:
    """Turns observations into t. Fed with every request's uncached length; asked before decisions."""

    def __init__(
        self,
        *,
        local: TimeCurve,
        prfaas: TimeCurve,
        kv: KvLayout,
        start_t_tokens: int,
        window: int = 1000,
        solve_interval_s: float = 10.0,
        hysteresis: float = 0.02,
        min_sample: int = 50,
        local_weight: float = 3.0,
        damping_per_s: float = 3.0,
    ) -> None:
        """`local`, `prfaas`: T_prefill on either path. `window`: requests in the sample. `hysteresis`: relative change
        of t below which it stays as it is. `local_weight`, `damping_per_s`: w and d; the defaults were chosen on the
        scenarios of docs/reproduction.md.
        """
        self._local, self._prfaas, self._kv = local, prfaas, kv
        self._sample: deque[tuple[float, float, float]] = deque(maxlen=window)
        self._solve_interval_s, self._hysteresis, self._min_sample = solve_interval_s, hysteresis, min_sample
        self._local_weight, self._damping_per_s = local_weight, damping_per_s
        self._solved_at_s = float("-inf")
        self._solved_for: tuple[float, float, float] = (0.0, 0.0, 0.0)
        self._t_balanced, self._busy_s, self._rate = float(start_t_tokens), 0.0, 0.0
        self._grid = np.geomspace(16.0, 2.0**20, 256)
        self._lengths: list[float] = self._grid.tolist()
        self._gain: list[float] = self._lengths
        self._choice = ThresholdChoice(start_t_tokens, float(start_t_tokens), 0.0, "start")

    def observe(self, now_s: float, local_tokens: int, prfaas_tokens: int) -> None:
        """Count one request: the tokens that either path would have to compute."""
        self._sample.append((now_s, float(max(1, local_tokens)), float(max(1, prfaas_tokens))))

    def choose(self, state: LiveState, local_tokens: int = 0, prfaas_tokens: int = 0) -> ThresholdChoice:
        """The threshold for this moment.

        And for this request: where only the PD site holds its prefix, offloading would compute that again, and t is
        higher by the length that makes up for it.
        """
        resources = (state.prfaas.servers, state.local.servers, state.link_gbps)
        if state.now_s - self._solved_at_s >= self._solve_interval_s or self._differs(resources):
            self._solve(state, resources)
        if state.prfaas.servers <= 0 or state.link_gbps <= 0:
            what = "no PrfaaS server is alive" if state.prfaas.servers <= 0 else "the link is down"
            return self._settle(float(NOTHING_OFFLOADED), 1.0, what)
        if state.local.servers <= 0:
            return self._settle(0.0, 1.0, "no local prefill server is alive")
        rho = min(1.0, self._rate * self._busy_s)
        far_s = max(state.prfaas.wait_s, state.link_backlog_bytes / gbps_to_bytes_per_s(state.link_gbps))
        price = rho * max(0.0, self._gain_at(self._t_balanced))
        again_s = self._prfaas.at(float(prfaas_tokens)) - self._prfaas.at(float(local_tokens))
        near_s = state.local.wait_s
        damping = 1 + self._damping_per_s * min(far_s, near_s)
        needed = price + again_s + (far_s - self._local_weight * near_s) / damping
        reason = (
            f"t* {self._t_balanced:.0f}, rho {rho:.2f}, wait {far_s:.2f} s PrfaaS, {state.local.wait_s:.2f} s local"
        )
        return self._settle(self._length_of_gain(needed), rho, reason)

    def _solve(self, state: LiveState, resources: tuple[float, float, float]) -> None:
        self._solved_at_s, self._solved_for = state.now_s, resources
        if state.link_gbps > 0:
            self._gain = self._gains(state.link_gbps)
        if len(self._sample) < self._min_sample:
            return
        sample = np.array(self._sample)
        sample = sample[np.argsort(sample[:, 1])]
        lengths = sample[:, 1]
        local_s, prfaas_s = self._local.over(lengths), self._prfaas.over(sample[:, 2])
        self._t_balanced, self._busy_s = balanced_threshold(
            lengths, local_s, prfaas_s, self._kv.sizes_bytes(lengths), state
        )
        span_s = state.now_s - self._sample[0][0]
        self._rate = len(self._sample) / span_s if span_s > 0 else 0.0

    def _differs(self, resources: tuple[float, float, float]) -> bool:
        """Whether servers or link are more than a twentieth away from what t* was solved for."""
        (far, near, gbps), (old_far, old_near, old_gbps) = resources, self._solved_for
        return (
            abs(far - old_far) > 0.05 * old_far
            or abs(near - old_near) > 0.05 * old_near
            or abs(gbps - old_gbps) > 0.05 * old_gbps
        )

    def _gains(self, link_gbps: float) -> list[float]:
        """D over the grid of lengths: KV that the link cannot carry during prefill is exposed, and the state always."""
        bytes_per_s = gbps_to_bytes_per_s(link_gbps)
        sending_s = (self._kv.sizes_bytes(self._grid) - self._kv.state_bytes) / bytes_per_s
        far_s = np.maximum(self._prfaas.over(self._grid), sending_s) + self._kv.state_bytes / bytes_per_s
        gains: list[float] = np.maximum.accumulate(self._local.over(self._grid) - far_s).tolist()
        return gains

    def _gain_at(self, tokens: float) -> float:
        return _between(tokens, self._lengths, self._gain)

    def _length_of_gain(self, gain_s: float) -> float:
        """The shortest length that offloading gains this much."""
        if gain_s <= self._gain[0]:
            return 0.0
        if gain_s > self._gain[-1]:
            return float(NOTHING_OFFLOADED)
        return _between(gain_s, self._gain, self._lengths)

    def _settle(self, t: float, rho: float, reason: str) -> ThresholdChoice:
        old = self._choice.t_tokens
        if abs(t - old) <= self._hysteresis * old and old < NOTHING_OFFLOADED:
            t, reason = float(old), f"{reason}; kept"
        self._choice = ThresholdChoice(round(t), self._t_balanced, rho, reason)
        return self._choice


def _between(x: float, xs: list[float], ys: list[float]) -> float:
    """y at x on the lines between points; xs do not fall. Quicker than numpy for one x."""
    if x >= xs[-1]:
        return ys[-1]
    if x < xs[0]:
        return ys[0]
    left = bisect_right(xs, x) - 1
    return ys[left] + (ys[left + 1] - ys[left]) / (xs[left + 1] - xs[left]) * (x - xs[left])
