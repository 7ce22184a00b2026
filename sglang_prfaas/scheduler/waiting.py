"""Requests that wait in front of prefill servers, and what is asked of them again and again: who is first, and what all
of them need. None of it looks at everybody. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Hashable
from typing import Generic, TypeVar

from msgspec import Struct

from sglang_prfaas.core.request import Route
from sglang_prfaas.scheduler.overload import Lateness

Key = TypeVar("Key", bound=Hashable)
_PARTS = float(1 << 30)


class Waiting(Struct, Generic[Key], eq=False, gc=False):
    """One request that waits. `local_s`, `prfaas_s`: what either path needs once a server has it, transfer included."""

    key: Key
    number: int
    """In the order in which they were added."""
    arrived_s: float
    local_s: float
    prfaas_s: float
    fixed: bool
    """The other path must not take it."""
    link_bytes: float
    """What PrfaaS would send of it."""
    lateness: Lateness
    is_long: bool
    """Among the longest of the recent ones."""

    def work_s(self, route: Route) -> float:
        """Seconds on one path."""
        return self.local_s if route == "local" else self.prfaas_s


class Ordered(Generic[Key]):
    """Waiting requests by a figure of each that stays as it is, the smallest first, of equal ones who was added first.
    Those that have left are forgotten when they come to the front."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiting[Key]]] = []
        self._there: set[int] = set()

    def add(self, figure: float, entry: Waiting[Key]) -> None:
        """One more. O(log n)."""
        self._there.add(entry.number)
        heapq.heappush(self._heap, (figure, entry.number, entry))

    def remove(self, entry: Waiting[Key]) -> None:
        """One leaves, if it is there. O(log n) in the long run."""
        self._there.discard(entry.number)
        while self._heap and self._heap[0][1] not in self._there:
            heapq.heappop(self._heap)

    def first(self) -> Waiting[Key] | None:
        """The one with the smallest figure."""
        return self._heap[0][2] if self._heap else None

    def pop_below(self, bound: float) -> list[Waiting[Key]]:
        """Those whose figure is below a bound leave, in the order in which they were added."""
        gone = []
        while self._heap and self._heap[0][0] < bound:
            gone.append(self._heap[0][2])
            self.remove(gone[-1])
        return sorted(gone, key=_number)


class Total:
    """A sum of what comes and goes again. Exact to 2^-30, so that nothing is left of what has gone."""

    __slots__ = ("_infinite", "_parts")

    def __init__(self) -> None:
        self._parts = self._infinite = 0

    def add(self, value: float, times: int = 1) -> None:
        """One more; times -1: one that was added goes."""
        if value == float("inf"):
            self._infinite += times
        else:
            self._parts += times * round(value * _PARTS)

    def __float__(self) -> float:
        return float("inf") if self._infinite else self._parts / _PARTS


class Group(Generic[Key]):
    """Waiting requests of one path, in the order in which they came here, and what they need together. Keys are
    unique. Everything takes as long for many of them as for few."""

    def __init__(self, route: Route) -> None:
        self.entries: dict[Key, Waiting[Key]] = {}
        self._route: Route = route
        self._work_s, self._link_bytes = Total(), Total()

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def work_s(self) -> float:
        """Seconds of prefill, on one server."""
        return float(self._work_s)

    @property
    def link_bytes(self) -> float:
        """What PrfaaS would send of them."""
        return float(self._link_bytes)

    def add(self, entry: Waiting[Key]) -> None:
        """One more."""
        self.entries[entry.key] = entry
        self._count(entry, 1)

    def pop(self, key: Key) -> Waiting[Key] | None:
        """One leaves; None where it is not here."""
        entry = self.entries.pop(key, None)
        if entry is not None:
            self._count(entry, -1)
        return entry

    def _count(self, entry: Waiting[Key], times: int) -> None:
        self._work_s.add(entry.work_s(self._route), times)
        self._link_bytes.add(entry.link_bytes, times)


def _number(entry: Waiting[Key]) -> int:
    return entry.number
