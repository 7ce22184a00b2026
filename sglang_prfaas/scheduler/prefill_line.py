"""The requests of one PD site that wait in front of prefill servers: `DispatchQueue` with limits and an objective.

A server has room while its predicted work ends within `feed_s`, or its prompts in work come to fewer tokens than
`feed_tokens`: so it never runs dry, and short prompts still fill a chunk together. Nobody is held for longer than
`max_held_s`, but under an overload that lets the line go on. Without a promised TTFT the objective is twice the P90 of
what recent requests needed on their path. Pure: times are passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import numpy as np
from msgspec import Struct

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.core.request import Route
from sglang_prfaas.scheduler.dispatch import LINK_LEAD_S, ROUTES, Ahead, DispatchQueue

Key = TypeVar("Key", bound=Hashable)
_STALLED_S = 5.0
"""A line that has sent nobody for so long does not go on."""


class ServerLoad(Struct, frozen=True):
    """One usable prefill server: seconds of work that it has, and prompt tokens that it has not answered."""

    left_s: float
    tokens: int


class Waits(Struct, frozen=True):
    """Who waits for one path. `work_s`: seconds of prefill on one server."""

    requests: int
    work_s: float
    oldest_s: float


class PrefillLine(Generic[Key]):
    """Keys are unique. A request that `next` or `overdue` names is not in the line any more."""

    def __init__(self, settings: PolicyConfig) -> None:
        self._settings = settings
        self._needed_s: deque[float] = deque(maxlen=settings.window_requests)
        self._measured_s = self._sent_s = float("-inf")
        self._queue: DispatchQueue[Key] = DispatchQueue(
            ttft_slo_s=settings.slo_ttft_s or 1.0, max_wait_s=settings.max_held_s
        )
        self._arrived: dict[Key, tuple[float, Route]] = {}

    def __len__(self) -> int:
        return len(self._arrived)

    @property
    def objective_s(self) -> float:
        """The time to the first token that the order aims at."""
        return self._queue.ttft_slo_s

    @property
    def oldest_s(self) -> float:
        """When the one who waits longest came; infinite where nobody waits."""
        return next((at_s for at_s, _ in self._arrived.values()), float("inf"))

    def observe(self, now_s: float, needed_s: float) -> None:
        """A request needs `needed_s` on its path, without waiting."""
        self._needed_s.append(needed_s)
        young = len(self._needed_s) < 2 * self._settings.window_requests // 100
        if self._settings.slo_ttft_s or (now_s - self._measured_s < self._settings.solve_interval_s and not young):
            return
        self._measured_s = now_s
        self._queue.ttft_slo_s = max(1e-3, 2 * float(np.quantile(np.array(self._needed_s), 0.9)))

    def has_room(self, server: ServerLoad) -> bool:
        """Whether a server should have another request."""
        return server.left_s <= self._settings.feed_s or server.tokens < self._settings.feed_tokens

    def link_has_room(self, link_s: float) -> bool:
        """Whether a link should have more, that needs `link_s` for what was sent over it so far."""
        return link_s <= LINK_LEAD_S

    def add(
        self,
        key: Key,
        route: Route,
        now_s: float,
        *,
        local_s: float,
        prfaas_s: float,
        fixed: bool,
        link_bytes: float = 0.0,
    ) -> None:
        """A request waits for a path. `local_s`, `prfaas_s`: what either path needs once a server has it.
        `link_bytes`: what PrfaaS would send of it.
        """
        self._arrived[key] = (now_s, route)
        self._queue.add(
            key, route, arrived_s=now_s, local_s=local_s, prfaas_s=prfaas_s, fixed=fixed, link_bytes=link_bytes
        )

    def remove(self, key: Key) -> None:
        """A request was given up, or is decided anew."""
        self._arrived.pop(key, None)
        self._queue.remove(key)

    def keys(self, route: Route) -> list[Key]:
        """Who waits for a path."""
        return self._queue.keys(route)

    def overdue(self, now_s: float) -> list[tuple[Key, Route]]:
        """Those who were held for as long as anybody may be: they go to a server, whether it has room or not.

        Nobody under an overload, as long as the line goes on: there would be so many that servers had no room for
        anybody else. They have their share of the turns (`DispatchQueue`).
        """
        if self._queue.overloaded and now_s - self._sent_s < _STALLED_S:
            return []
        found = []
        for key, (arrived_s, route) in list(self._arrived.items()):
            if now_s - arrived_s < self._settings.max_held_s:
                break  # in order of arrival
            found.append((key, route))
            self.remove(key)
        return found

    def next(
        self,
        route: Route,
        now_s: float,
        servers: Sequence[ServerLoad],
        others: Sequence[ServerLoad],
        link_s: float,
    ) -> Key | None:
        """Who goes to a server of this path now; None where no server has room, or nobody should go there.

        servers, others: the usable servers of this path, and of the other one. link_s: `DispatchQueue.take`.
        """
        if not self._arrived or not any(map(self.has_room, servers)):
            return None
        left_s, other_left_s = [one.left_s for one in servers], [one.left_s for one in others]
        key = self._queue.take(route, now_s, left_s, other_left_s, link_s)
        if key is not None:
            del self._arrived[key]
            self._sent_s = now_s
        return key

    def ahead(self, route: Route, now_s: float) -> Ahead:
        """`DispatchQueue.ahead`."""
        return self._queue.ahead(route, now_s)

    def waits(self, now_s: float) -> dict[Route, Waits]:
        """Who waits, by path."""
        found = {}
        for route in ROUTES:
            oldest_s = min((at_s for at_s, path in self._arrived.values() if path == route), default=now_s)
            found[route] = Waits(self._queue.waiting(route), self._queue.work_s(route), now_s - oldest_s)
        return found
