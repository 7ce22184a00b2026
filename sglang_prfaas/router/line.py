"""Requests held back in the router until a prefill server has room: `scheduler.prefill_line` with futures and a timer.

One line for each PD site; the PrfaaS sites' servers serve all of them, the one whose request waits longest first.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from sglang_prfaas.core.request import RequestView, Route
from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.metrics import Gauge
from sglang_prfaas.router.registry import Target
from sglang_prfaas.router.tokens import TokenCount
from sglang_prfaas.scheduler import Decision
from sglang_prfaas.scheduler.dispatch import ROUTES
from sglang_prfaas.scheduler.prefill_line import PrefillLine, ServerLoad

if TYPE_CHECKING:
    from sglang_prfaas.router.live_policy import Flight, LiveRouting

_INFINITE = float("inf")
_LOOK_S = 0.25
"""Servers that come back, and reports, are seen at the latest after so long."""
_LEAST_LOOK_S = 0.002


class Turn(Struct, frozen=True):
    """What became of a request that had to wait: where it goes, if anywhere, and how long it was held."""

    decision: Decision
    flight: Flight | None
    held_s: float


class _Held(Struct, eq=False):
    """One request that waits."""

    turn: asyncio.Future[Turn]
    since_s: float
    decision: Decision
    view: RequestView
    body: ParsedBody
    tokens: TokenCount
    home: str


class Line:
    """The lines of all PD sites. Belongs to the event loop it was made in."""

    def __init__(self, policy: LiveRouting) -> None:
        self._policy, self._settings = policy, policy.config.policy
        self._loop = asyncio.get_running_loop()
        self._lines: dict[str, PrefillLine[_Held]] = {
            site.name: PrefillLine(self._settings) for site in policy.config.sites if site.role == "pd"
        }
        self._timer: asyncio.TimerHandle | asyncio.Handle | None = None
        self._wakes_at_s = _INFINITE

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    async def turn(self, decision: Decision, view: RequestView, body: ParsedBody, tokens: TokenCount) -> Turn:
        """Wait until a server has room for a request. Cancelled, it is in no queue any more."""
        figures, now_s = decision.figures, self._loop.time()
        if decision.prefill is None or decision.route is None or figures is None:
            return Turn(decision, None, 0.0)
        line = self._lines[figures.pd_site]
        local_s, prfaas_s = _needed_s(decision, tokens)
        line.observe(now_s, prfaas_s if decision.route == "prfaas" else local_s)
        if not len(self) and line.has_room(_load_of(decision.prefill)) and self._link_has_room(decision):
            return Turn(decision, self._policy.begin(now_s, decision, tokens), 0.0)
        if len(self) >= self._settings.max_held_requests:
            return Turn(self._refused(decision), None, 0.0)
        held = _Held(self._loop.create_future(), now_s, decision, view, body, tokens, figures.pd_site)
        self._add(held, local_s, prfaas_s)
        self.changed()
        try:
            return await held.turn
        except asyncio.CancelledError:
            line.remove(held)
            sent = held.turn.done() and not held.turn.cancelled() and held.turn.exception() is None
            if sent and (flight := held.turn.result().flight) is not None:
                flight.ended(self._loop.time())
            raise

    def changed(self) -> None:
        """A server may have room now: look soon."""
        if len(self):
            self._wake(self._policy.look_interval_s)

    def held_s(self, now_s: float) -> dict[str, float]:
        """Seconds that what goes before a new request needs of each server of a site, or of its links."""
        found = {home: line.ahead("local", now_s).work_s for home, line in self._lines.items()}
        ahead = {home: line.ahead("prfaas", now_s) for home, line in self._lines.items()}
        far_s = sum(each.work_s for each in ahead.values())
        links_s = max(each.link_bytes / self._policy.link_bytes_per_s(home) for home, each in ahead.items())
        servers = dict.fromkeys((site.name for site in self._policy.observation.sites), 0)
        far = 0
        for site in self._policy.observation.sites:
            servers[site.name] = sum(server.alive and server.role == "prefill" for server in site.servers)
            if site.role == "prfaas":
                found[site.name] = far_s
                far += servers[site.name]
        return {
            name: seconds / max(1, servers[name]) if name in self._lines else max(seconds / max(1, far), links_s)
            for name, seconds in found.items()
        }

    def local_work_s(self, home: str) -> float:
        """Seconds of local prefill, on one server, that wait for a PD site."""
        return self._lines[home].waits(self._loop.time())["local"].work_s

    def describe(self, now_s: float) -> dict[str, Any]:
        """The lines, for `GET /policy`."""
        return {home: {"objective_s": line.objective_s, **line.waits(now_s)} for home, line in self._lines.items()}

    def gauges(self, now_s: float) -> list[Gauge]:
        """Figures for `/metrics`."""
        waits = {(home, r): w for home, line in self._lines.items() for r, w in line.waits(now_s).items()}
        labels = ("site", "route")
        return [
            (
                "prfaas_router_held_requests",
                "Requests that wait in the router for a prefill server.",
                labels,
                [(key, wait.requests) for key, wait in waits.items()],
            ),
            (
                "prfaas_router_held_work_seconds",
                "Seconds of prefill, on one server, that wait in the router.",
                labels,
                [(key, wait.work_s) for key, wait in waits.items()],
            ),
            (
                "prfaas_router_held_oldest_seconds",
                "How long the oldest request has waited in the router.",
                labels,
                [(key, wait.oldest_s) for key, wait in waits.items()],
            ),
        ]

    # --- who goes ---------------------------------------------------------------------------------------------------

    def _link_has_room(self, decision: Decision) -> bool:
        figures = decision.figures
        assert figures is not None
        home = figures.pd_site
        return decision.route != "prfaas" or self._lines[home].link_has_room(self._policy.link_s(home))

    def _add(self, held: _Held, local_s: float, prfaas_s: float) -> None:
        figures = held.decision.figures
        assert held.decision.route is not None
        assert figures is not None
        self._lines[held.home].add(
            held,
            held.decision.route,
            held.since_s,
            local_s=local_s,
            prfaas_s=prfaas_s,
            fixed=held.view.forced is not None or _INFINITE in (local_s, prfaas_s),
            link_bytes=self._policy.increment_bytes(held.tokens, figures),
        )

    def _wake(self, in_s: float) -> None:
        at_s = self._loop.time() + in_s
        if self._timer is not None:
            if self._wakes_at_s <= at_s:
                return
            self._timer.cancel()
        self._wakes_at_s = at_s
        self._timer = self._loop.call_later(in_s, self._look) if in_s else self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Send whoever may go, and come again when a server is to have room."""
        self._timer, self._wakes_at_s = None, _INFINITE
        now_s = self._loop.time()
        self._policy.look(now_s)
        for home, line in self._lines.items():
            for held, route in line.overdue(now_s):
                self._send(held, route, now_s)
            for route in ROUTES:
                if not self._servers(route, home):
                    self._decide_anew(line, route, now_s)
        for home, line in self._lines.items():
            self._feed("local", [(home, line)], now_s)
        self._feed("prfaas", list(self._lines.items()), now_s)
        if len(self):
            first_s = min((one.left_s for one in self._all_servers()), default=_INFINITE) - self._settings.feed_s
            self._wake(min(_LOOK_S, max(_LEAST_LOOK_S, first_s if first_s > 0 else _LOOK_S)))

    def _feed(self, route: Route, lines: list[tuple[str, PrefillLine[_Held]]], now_s: float) -> None:
        """Requests of these lines to the servers of one path, until none has room or none should go."""
        other: Route = "prfaas" if route == "local" else "local"
        waiting = [(home, line) for home, line in lines if len(line)]
        while waiting:
            waiting.sort(key=lambda item: item[1].oldest_s)
            for home, line in waiting:
                link_s = self._policy.link_s(home)
                held = line.next(route, now_s, self._servers(route, home), self._servers(other, home), link_s)
                if held is not None:
                    self._send(held, route, now_s)
                    break
            else:
                return
            waiting = [item for item in waiting if len(item[1])]

    def _send(self, held: _Held, route: Route, now_s: float) -> None:
        """Choose servers of this path for a request, and let it go. What goes wrong with it is its own affair."""
        try:
            decision = self._policy.bind(now_s, held.view, held.body, held.home, held.decision, route)
            flight = self._policy.begin(now_s, decision, held.tokens) if decision.prefill is not None else None
        except Exception as error:  # noqa: BLE001 - raised again where the request is served
            if not held.turn.done():
                held.turn.set_exception(error)
            return
        if held.turn.done():
            if flight is not None:
                flight.ended(now_s)
            return
        held.turn.set_result(Turn(decision, flight, now_s - held.since_s))

    def _decide_anew(self, line: PrefillLine[_Held], route: Route, now_s: float) -> None:
        """No server of a path is left: what waits for it takes another one, or has none."""
        for held in line.keys(route):
            line.remove(held)
            held.decision = self._policy.decide(now_s, held.view, held.body)
            figures = held.decision.figures
            if held.decision.prefill is None or held.decision.route in (None, route) or figures is None:
                held.turn.set_result(Turn(held.decision, None, now_s - held.since_s))
                continue
            held.home = figures.pd_site
            self._add(held, *_needed_s(held.decision, held.tokens))

    def _servers(self, route: Route, home: str) -> list[ServerLoad]:
        """The usable prefill servers of a path."""
        found = []
        for site in self._policy.observation.sites:
            if (site.name != home) if route == "local" else (site.role != "prfaas"):
                continue
            link = self._policy.observation.links.get((site.name, home))
            if route == "prfaas" and link is not None and link.bytes_per_s <= 0:
                continue
            found += [_load_of(server) for server in site.servers if server.alive and server.role == "prefill"]
        return found

    def _all_servers(self) -> list[ServerLoad]:
        return [
            _load_of(target) for target in self._policy.registry.targets() if target.alive and target.role == "prefill"
        ]

    def _refused(self, decision: Decision) -> Decision:
        figures = decision.figures
        assert figures is not None
        reason = f"{len(self)} requests wait for prefill, which is policy.max_held_requests"
        retry_s = max(1.0, min(figures.local_wait_s, figures.prfaas_wait_s))
        return msgspec.structs.replace(
            decision,
            route=None,
            prefill=None,
            decode=None,
            reason=reason,
            reason_class="busy_prefill",
            retry_after_s=retry_s,
        )


def _load_of(server: object) -> ServerLoad:
    assert isinstance(server, Target)
    return ServerLoad(server.wait_s, server.queue.tokens)


def _needed_s(decision: Decision, tokens: TokenCount) -> tuple[float, float]:
    """What either path needs once a server has the request: prefill and exposed transfer, of a batch all of it."""
    figures = decision.figures
    assert figures is not None
    prompts = max(1.0, tokens.total / max(1, tokens.longest))
    near = figures.local_ttft_s - figures.local_wait_s if figures.local_wait_s < _INFINITE else _INFINITE
    far = figures.prfaas_ttft_s - figures.prfaas_wait_s if figures.prfaas_wait_s < _INFINITE else _INFINITE
    return near * prompts, far * prompts
