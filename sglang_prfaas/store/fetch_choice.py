"""Whether to fetch a prefix from another site or to compute it: whichever is expected to take less time. Pure."""

from __future__ import annotations

import math
from typing import Protocol

from msgspec import Struct

FORGET_HALF_LIFE_S = 60.0
"""In which what was measured of a peer loses half its weight against the configured capacity: a link that was slow once
is tried again."""
WEIGHT = 0.5
"""Of the last measurement."""
LEAST_SAMPLE_BYTES = 64 << 10
"""Smaller fetches take a round trip and tell nothing of the rate."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 1.0, 60.0


class PrefillTime(Protocol):
    """T_prefill(l): a profile's curve, or `TokensPerSecond`."""

    def at(self, x: float) -> float:
        """Seconds to compute x tokens of which none is cached."""


class TokensPerSecond(Struct, frozen=True):
    """A prefill time that grows with the tokens alone."""

    tokens_per_s: float

    def at(self, x: float) -> float:
        return x / self.tokens_per_s


class PeerEstimate:
    """Rate and round-trip time of one peer, and whether it is worth asking at all. Not thread-safe."""

    def __init__(self, capacity_bytes_per_s: float, rtt_s: float) -> None:
        self._capacity = capacity_bytes_per_s
        self._log_ratio = 0.0  # measured rate over capacity
        self._measured_s = 0.0
        self._rest_until_s = -math.inf
        self._failures = 0
        self.rtt_s = rtt_s

    def bytes_per_s(self, now_s: float) -> float:
        return self._capacity * math.exp(self._ratio(now_s))

    def moved(self, nbytes: int, seconds: float, now_s: float) -> None:
        """A fetch of this size took so long, or got so far, its round trip included."""
        if nbytes >= LEAST_SAMPLE_BYTES:
            rate = nbytes / max(seconds - self.rtt_s, seconds / 10, 1e-6)
            self._log_ratio = (1 - WEIGHT) * self._ratio(now_s) + WEIGHT * math.log(rate / self._capacity)
            self._measured_s = now_s

    def answered(self, seconds: float) -> None:
        """A question took so long; what a first one needed to dial is soon forgotten."""
        self.rtt_s = (1 - WEIGHT) * self.rtt_s + WEIGHT * seconds
        self._failures = 0

    def failed(self, now_s: float) -> None:
        """The peer did not answer, or not to the end: it rests for a while, longer with every time in a row."""
        self._rest_until_s = now_s + min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(self._failures, 16))
        self._failures += 1

    def rests(self, now_s: float) -> bool:
        return now_s < self._rest_until_s

    def fetch_s(self, nbytes: int, outstanding_bytes: int, now_s: float) -> float:
        """Expected seconds for so many bytes, behind those of other fetches."""
        return self.rtt_s + (nbytes + outstanding_bytes) / self.bytes_per_s(now_s)

    def _ratio(self, now_s: float) -> float:
        return self._log_ratio * math.pow(0.5, (now_s - self._measured_s) / FORGET_HALF_LIFE_S)


class Choice(Struct, frozen=True):
    """What was decided, and the figures."""

    fetch: bool
    fetch_s: float
    compute_s: float

    def __str__(self) -> str:
        comparison = "less" if self.fetch else "not clearly less"
        return f"expected fetch {self.fetch_s:.3g} s, {comparison} than {self.compute_s:.3g} s to compute"


def compute_s(prefill: PrefillTime, tokens_before: int, tokens_after: int) -> float:
    """Seconds to compute from one length to the other: T_prefill(after) - T_prefill(before)."""
    return max(0.0, prefill.at(tokens_after) - prefill.at(tokens_before))


def choose(fetch_s: float, to_compute_s: float, margin: float) -> Choice:
    """Fetch where it takes less than the share 1 - margin of the time to compute."""
    return Choice(fetch_s < (1 - margin) * to_compute_s, fetch_s, to_compute_s)
