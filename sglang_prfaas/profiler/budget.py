"""Time for profiling: one budget, of which every stage gets its share of what is left."""

from __future__ import annotations

import time
from collections.abc import Callable

SLACK_S = 60.0
"""How far beyond its budget a request that is already under way may go before it counts as hung."""


class Budget:
    """A deadline, and whether something still fits before it."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._end_s = clock() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self._end_s - self._clock())

    def fits(self, seconds: float) -> bool:
        """Whether something that takes so long would end in time."""
        return seconds < self.left_s

    def share(self, part: float, of: float) -> Budget:
        """A budget of part / of of what is left."""
        return Budget(self.left_s * part / of, self._clock)
