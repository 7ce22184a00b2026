"""Time as a value that is passed in: wall clock in production, virtual in simulation and tests."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds. Never compared between processes."""

    def now_s(self) -> float: ...


class MonotonicClock:
    """The process's monotonic clock."""

    def now_s(self) -> float:
        return time.monotonic()


class VirtualClock:
    """A clock that moves only when told to."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward. Raises ValueError for a negative step."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back: {seconds} s")
        self._now_s += seconds


class Deadline:
    """A point in time carried through all the steps of one operation."""

    __slots__ = ("_at_s", "_clock", "budget_s")

    def __init__(self, clock: Clock, budget_s: float) -> None:
        self._clock = clock
        self.budget_s = budget_s
        self._at_s = clock.now_s() + budget_s

    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self._at_s - self._clock.now_s())

    @property
    def expired(self) -> bool:
        return self._clock.now_s() >= self._at_s

    def __repr__(self) -> str:
        return f"Deadline({self.remaining_s():.3f} s of {self.budget_s} s left)"
