"""What a link carries at most, learnt from the times in which it was full. Pure.

The largest rate of the last `WINDOW_S` in which it was full counts, so that a link that drops is known within a second.
A larger rate counts in any case. Until it was measured it is as configured; a measurement older than `HOLD_S` goes back
to the configured value with a half-life of `HALF_LIFE_S`, so that a link which was once slow is tried again. Where none
is configured it goes to the largest rate that was ever seen, or to `GROWTH` times itself if that is more: whoever sends
nothing over a slow link measures nothing either, and would never learn that it is not slow any more.
"""

from __future__ import annotations

from collections import deque

WINDOW_S = 0.5
HOLD_S = 5.0
HALF_LIFE_S = 10.0
GROWTH = 8.0


class LinkCapacity:
    """Not thread-safe."""

    def __init__(self, configured_bytes_per_s: float = 0.0) -> None:
        self._configured = configured_bytes_per_s
        self._measured = self._best = 0.0
        self._measured_s = 0.0
        self._averages: deque[tuple[float, float]] = deque()

    def filled(self, now_s: float, bytes_per_s: float) -> None:
        """The mean rate of the last moments, in which the network was the limit."""
        while self._averages and now_s - self._averages[0][0] > WINDOW_S:
            self._averages.popleft()
        self._averages.append((now_s, bytes_per_s))
        self._measured = max(rate for _, rate in self._averages)
        self._measured_s = now_s
        self._best = max(self._best, self._measured)

    def at_least(self, now_s: float, bytes_per_s: float) -> None:
        """A rate that was reached, whatever its limit was. It does not make the measurement younger."""
        if bytes_per_s > self.at(now_s):
            self._measured, self._measured_s = bytes_per_s, max(self._measured_s, now_s - HOLD_S)
            self._best = max(self._best, bytes_per_s)

    def at(self, now_s: float) -> float:
        """Bytes per second, 0 where nothing is known."""
        if not self._measured:
            return self._configured
        old_s = now_s - self._measured_s - HOLD_S
        if old_s <= 0:
            return self._measured
        target = self._configured or max(self._best, GROWTH * self._measured)
        return float(target + (self._measured - target) * 0.5 ** (old_s / HALF_LIFE_S))
