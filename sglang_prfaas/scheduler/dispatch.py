"""Which waiting request a prefill server takes next: requests wait in front of the servers, not at them.

A request is bound to a server when that server has room, so that the order can still change, and either path can help
the other. Among the requests of a path:

1. Those that can still have their first token within the TTFT objective, in order of arrival, but for the longest ones
   where not all of them can make it (Moore and Hodgson's rule: it lets the fewest miss).
2. Then those that cannot: by arrival plus `slack` times their prefill time, so that short ones pass long ones, but not
   for ever.
3. Before all of them, whoever has waited for `max_wait_s`.

A path without requests helps the other one: PrfaaS takes the request that it speeds up most, local prefill the shortest
one if that is done sooner there. Pure: times are passed in.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator, Sequence
from typing import Generic, TypeVar

from msgspec import Struct

from sglang_prfaas.core.request import Route
from sglang_prfaas.errors import ConfigError

Key = TypeVar("Key", bound=Hashable)
ROUTES: tuple[Route, ...] = ("local", "prfaas")


class Waiting(Struct, Generic[Key], eq=False, gc=False):
    """One request that waits. `local_s`, `prfaas_s`: what either path needs once a server has it, transfer included."""

    key: Key
    arrived_s: float
    local_s: float
    prfaas_s: float
    fixed: bool
    """The other path must not take it."""

    def work_s(self, route: Route) -> float:
        """Seconds on one path."""
        return self.local_s if route == "local" else self.prfaas_s


class DispatchQueue(Generic[Key]):
    """The waiting requests of both paths. Keys are unique."""

    def __init__(self, *, ttft_slo_s: float, max_wait_s: float = 120.0, slack: float = 10.0) -> None:
        """`ttft_slo_s`: objective for the time to the first token. Raises ConfigError where it is not positive."""
        if not (ttft_slo_s > 0 and max_wait_s > 0 and slack >= 0):
            raise ConfigError(
                f"prefill order: ttft_slo_s {ttft_slo_s} and max_wait_s {max_wait_s} must be positive, slack {slack} "
                "not negative"
            )
        self.ttft_slo_s = ttft_slo_s
        """May change; who has missed it stays behind the others."""
        self._max_wait_s, self._slack = max_wait_s, slack
        self._timely: dict[Route, dict[Key, Waiting[Key]]] = {"local": {}, "prfaas": {}}
        self._late: dict[Route, dict[Key, Waiting[Key]]] = {"local": {}, "prfaas": {}}

    def add(
        self, key: Key, route: Route, *, arrived_s: float, local_s: float, prfaas_s: float, fixed: bool = False
    ) -> None:
        """A request waits for a path."""
        self._timely[route][key] = Waiting(key, arrived_s, local_s, prfaas_s, fixed)

    def remove(self, key: Key) -> bool:
        """Forget a request that was given up. False where it does not wait."""
        return any(queue.pop(key, None) is not None for queue in self._all())

    def waiting(self, route: Route) -> int:
        """Requests that wait for a path."""
        return len(self._timely[route]) + len(self._late[route])

    def keys(self, route: Route) -> list[Key]:
        """Who waits for a path."""
        return [*self._timely[route], *self._late[route]]

    def work_s(self, route: Route) -> float:
        """Seconds of prefill that wait for a path, on one server."""
        return sum(entry.work_s(route) for queue in (self._timely, self._late) for entry in queue[route].values())

    def timely_work_s(self, route: Route, now_s: float) -> float:
        """Seconds of prefill, on one server, of the requests that can still make it: they go before a new one."""
        self._expire(route, now_s)
        return sum(entry.work_s(route) for entry in self._timely[route].values())

    def take(
        self,
        route: Route,
        now_s: float,
        left_s: Sequence[float],
        other_left_s: Sequence[float],
        link_s: float = 0.0,
    ) -> Key | None:
        """The request that a server with room should have next; None where it should stay free.

        `left_s`, `other_left_s`: for every usable server of this path and of the other one, the seconds of work that
        it has, without what waits here. `link_s`: seconds that the link needs for what was sent over it so far, and for
        what is being computed. The request is no longer in the queue then.
        """
        self._expire(route, now_s)
        entry = self._next(route, now_s, left_s) or self._help(route, other_left_s, link_s)
        if entry is not None:
            self.remove(entry.key)
        return entry.key if entry is not None else None

    def _all(self) -> Iterator[dict[Key, Waiting[Key]]]:
        for route in ROUTES:
            yield self._timely[route]
            yield self._late[route]

    def _expire(self, route: Route, now_s: float) -> None:
        """Requests that cannot make it any more go behind the others."""
        timely = self._timely[route]
        gone = [
            entry for entry in timely.values() if now_s + entry.work_s(route) > entry.arrived_s + self.ttft_slo_s + 1e-9
        ]
        for entry in gone:
            del timely[entry.key]
            self._late[route][entry.key] = entry

    def _next(self, route: Route, now_s: float, left_s: Sequence[float]) -> Waiting[Key] | None:
        late = self._late[route].values()
        if late:
            oldest = min(late, key=_arrived)
            if now_s - oldest.arrived_s >= self._max_wait_s:
                return oldest
        timely = sorted(self._timely[route].values(), key=_arrived)
        if timely:
            left_out = self._left_out(route, timely, now_s, left_s)
            return next((entry for entry in timely if id(entry) not in left_out), timely[0])
        return min(late, key=lambda entry: entry.arrived_s + self._slack * entry.work_s(route), default=None)

    def _left_out(self, route: Route, timely: list[Waiting[Key]], now_s: float, left_s: Sequence[float]) -> set[int]:
        """Moore and Hodgson: walk in order of deadlines, and leave out the longest one whenever one would be late.

        The servers count as one that is as fast as all of them; a request still takes its own time on one of them.
        """
        servers = max(1, len(left_s))
        before_s = sum(left_s) / servers
        longest: list[tuple[float, int]] = []
        left_out: set[int] = set()
        for entry in timely:
            work_s = entry.work_s(route)
            heapq.heappush(longest, (-work_s, id(entry)))
            before_s += work_s / servers
            if now_s + before_s - work_s / servers + work_s > entry.arrived_s + self.ttft_slo_s:
                negative, out = heapq.heappop(longest)
                before_s += negative / servers
                left_out.add(out)
        return left_out

    def _help(self, route: Route, other_left_s: Sequence[float], link_s: float) -> Waiting[Key] | None:
        """A request of the other path, where a free server of this one is likely to have it done sooner."""
        other: Route = "prfaas" if route == "local" else "local"
        free = [entry for queue in (self._timely, self._late) for entry in queue[other].values() if not entry.fixed]
        if not free:
            return None
        if route == "prfaas":
            entry = max(free, key=lambda entry: entry.local_s - entry.prfaas_s)
        else:
            entry = min(free, key=lambda entry: entry.local_s)
        if not other_left_s:
            return entry
        there_s = (sum(other_left_s) + self.work_s(other)) / len(other_left_s)
        far_s = max(entry.prfaas_s, link_s)
        here, there = (far_s, entry.local_s) if route == "prfaas" else (entry.local_s, far_s)
        return entry if here <= there + there_s else None


def _arrived(entry: Waiting[Key]) -> float:
    return entry.arrived_s
