"""Which waiting request a prefill server takes next: requests wait in front of the servers, not at them.

A request is bound to a server when that server has room, so that the order can still change, and either path can help
the other. Among the requests of a path:

1. Those that can still have their first token within the TTFT objective, in order of arrival, but for the longest ones
   where not all of them can make it (Moore and Hodgson's rule: it lets the fewest miss).
2. Then those that cannot: by arrival plus `slack` times their prefill time, so that short ones pass long ones, but not
   for ever.
3. Those that have waited for `max_wait_s` have a fifth of the time before all others.

That holds while at most a tenth of the recent requests are late. Under an overload (`overload.py`) it would leave the
late ones behind for as long as new ones come. Then all but the longest 7 % go in order of arrival, late or not, and
the longest ones after them, but for the fifth of 3.

A PrfaaS server takes nobody while the link has more to send than it can in `LINK_LEAD_S`: whoever waits here can still
go the other way, and a transfer does not share a slow link with a hundred others.

A path without requests helps the other one: PrfaaS takes the request that it speeds up most, local prefill the shortest
one if that is done sooner there. Pure: times are passed in.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Generic, NamedTuple

from sglang_prfaas.core.request import Route
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.overload import Overload
from sglang_prfaas.scheduler.waiting import Group, Key, Ordered, Waiting

ROUTES: tuple[Route, ...] = ("local", "prfaas")
LINK_LEAD_S = 2.0
_SHARE_OF_OLD = 0.2
"""Of the prefill time, for requests that have waited for `max_wait_s`."""


class Ahead(NamedTuple):
    """What goes before a new request of a path: seconds of prefill, on one server, and bytes for the link."""

    work_s: float
    link_bytes: float


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
        self._timely: dict[Route, Group[Key]] = {route: Group(route) for route in ROUTES}
        self._late: dict[Route, Group[Key]] = {route: Group(route) for route in ROUTES}
        self._starts: dict[Route, Ordered[Key]] = {route: Ordered() for route in ROUTES}
        """The timely ones, by when they would have had to start with a TTFT objective of 0."""
        self._usual: dict[Route, Ordered[Key]] = {route: Ordered() for route in ROUTES}
        self._long: dict[Route, Ordered[Key]] = {route: Ordered() for route in ROUTES}
        """All but the longest, and the longest, in order of arrival."""
        self._lent_s: dict[Route, float] = dict.fromkeys(ROUTES, 0.0)
        self._overload = Overload()
        self._added = 0

    @property
    def overloaded(self) -> bool:
        """Whether more of the recent requests are late than may be."""
        return self._overload.is_on

    def add(
        self,
        key: Key,
        route: Route,
        *,
        arrived_s: float,
        local_s: float,
        prfaas_s: float,
        link_bytes: float = 0.0,
        fixed: bool = False,
    ) -> None:
        """A request waits for a path. `link_bytes`: what PrfaaS would send of it."""
        lateness, is_long = self._overload.add(local_s if local_s < float("inf") else prfaas_s)
        self._added += 1
        entry = Waiting(key, self._added, arrived_s, local_s, prfaas_s, fixed, link_bytes, lateness, is_long)
        self._timely[route].add(entry)
        self._starts[route].add(arrived_s - entry.work_s(route), entry)
        (self._long if is_long else self._usual)[route].add(arrived_s, entry)

    def remove(self, key: Key) -> bool:
        """Forget a request that was given up. False where it does not wait."""
        for route in ROUTES:
            for group in (self._timely[route], self._late[route]):
                if (entry := group.pop(key)) is not None:
                    self._starts[route].remove(entry)
                    (self._long if entry.is_long else self._usual)[route].remove(entry)
                    return True
        return False

    def waiting(self, route: Route) -> int:
        """Requests that wait for a path."""
        return len(self._timely[route]) + len(self._late[route])

    def keys(self, route: Route) -> list[Key]:
        """Who waits for a path."""
        return [*self._timely[route].entries, *self._late[route].entries]

    def work_s(self, route: Route) -> float:
        """Seconds of prefill that wait for a path, on one server."""
        return self._timely[route].work_s + self._late[route].work_s

    def ahead(self, route: Route, now_s: float) -> Ahead:
        """What goes before a new request: those that can still make it, and under an overload everybody."""
        self._expire(route, now_s)
        groups = [self._timely[route], self._late[route]] if self.overloaded else [self._timely[route]]
        link_bytes = sum(group.link_bytes for group in groups) if route == "prfaas" else 0.0
        return Ahead(sum(group.work_s for group in groups), link_bytes)

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
        if route == "prfaas" and link_s > LINK_LEAD_S:
            return None
        self._expire(route, now_s)
        entry = self._next(route, now_s, left_s) or self._help(route, other_left_s, link_s)
        if entry is not None:
            self.remove(entry.key)
        return entry.key if entry is not None else None

    def _expire(self, route: Route, now_s: float) -> None:
        """Requests that cannot make it any more go behind the others."""
        for entry in self._starts[route].pop_below(now_s - self.ttft_slo_s - 1e-9):
            self._timely[route].pop(entry.key)
            self._late[route].add(entry)
            self._overload.missed(entry.lateness)

    def _next(self, route: Route, now_s: float, left_s: Sequence[float]) -> Waiting[Key] | None:
        oldest: Waiting[Key] | None
        if self.overloaded:
            oldest = self._long[route].first()
            chosen = self._usual[route].first() or oldest
        else:
            oldest = min(self._late[route].entries.values(), key=_arrived, default=None)
            chosen = self._in_time(route, now_s, left_s)
        if chosen is None or oldest is None or now_s - oldest.arrived_s < self._max_wait_s:
            return chosen
        if self._lent_s[route] <= 0:
            self._lent_s[route] += oldest.work_s(route)
            return oldest
        self._lent_s[route] -= chosen.work_s(route) * _SHARE_OF_OLD / (1 - _SHARE_OF_OLD)
        return chosen

    def _in_time(self, route: Route, now_s: float, left_s: Sequence[float]) -> Waiting[Key] | None:
        """Those that can make it, then the others, short ones first."""
        timely = sorted(self._timely[route].entries.values(), key=_arrived)
        if timely:
            left_out = self._left_out(route, timely, now_s, left_s)
            return next((entry for number, entry in enumerate(timely) if number not in left_out), timely[0])
        late = self._late[route].entries.values()
        return min(late, key=lambda entry: entry.arrived_s + self._slack * entry.work_s(route), default=None)

    def _left_out(self, route: Route, timely: list[Waiting[Key]], now_s: float, left_s: Sequence[float]) -> set[int]:
        """Moore and Hodgson: walk in order of deadlines, and leave out the longest one whenever one would be late, the
        last of equal ones. Returns their numbers in `timely`.

        The servers count as one that is as fast as all of them; a request still takes its own time on one of them.
        """
        servers = max(1, len(left_s))
        before_s = sum(left_s) / servers
        longest: list[tuple[float, int]] = []
        left_out: set[int] = set()
        for number, entry in enumerate(timely):
            work_s = entry.work_s(route)
            heapq.heappush(longest, (-work_s, -number))
            before_s += work_s / servers
            if now_s + before_s - work_s / servers + work_s > entry.arrived_s + self.ttft_slo_s:
                negative_s, negative_number = heapq.heappop(longest)
                before_s += negative_s / servers
                left_out.add(-negative_number)
        return left_out

    def _help(self, route: Route, other_left_s: Sequence[float], link_s: float) -> Waiting[Key] | None:
        """A request of the other path, where a free server of this one is likely to have it done sooner."""
        other: Route = "prfaas" if route == "local" else "local"
        free = [
            entry for group in (self._timely, self._late) for entry in group[other].entries.values() if not entry.fixed
        ]
        if not free:
            return None
        if route == "prfaas":
            entry = max(free, key=lambda entry: entry.local_s - entry.prfaas_s)
        else:
            entry = min(free, key=lambda entry: entry.local_s)
        if not other_left_s:
            return entry
        there_s = min(other_left_s) + (self.work_s(other) - entry.work_s(other)) / len(other_left_s)
        far_s = max(entry.prfaas_s, link_s)
        here, there = (far_s, entry.local_s) if route == "prfaas" else (entry.local_s, far_s)
        return entry if here <= there + there_s else None


def _arrived(entry: Waiting[Key]) -> float:
    return entry.arrived_s
