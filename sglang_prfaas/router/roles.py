"""`[policy.roles]` in the router: a role loop for every PD site whose agent takes commands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from sglang_prfaas.clock import Clock, MonotonicClock
from sglang_prfaas.config.schema import RouterConfig, RouterSite
from sglang_prfaas.core.units import bytes_per_s_to_gbps
from sglang_prfaas.errors import PrfaasError
from sglang_prfaas.monitor.load_source import LoadSource
from sglang_prfaas.monitor.reports import SwitchRole
from sglang_prfaas.router.agent_links import AgentLinks
from sglang_prfaas.router.metrics import Gauge
from sglang_prfaas.router.profile import router_profile, site_curve
from sglang_prfaas.router.role_loop import RoleLoop, RoleResult
from sglang_prfaas.scheduler import Decision
from sglang_prfaas.scheduler.long_term import RolePolicy
from sglang_prfaas.scheduler.role_capacity import MeasuredCapacity, RoleCapacity, SolvedCapacity
from sglang_prfaas.scheduler.throughput import Fleet
from sglang_prfaas.scheduler.types import Observation, ServerRole

log = logging.getLogger(__name__)


class AgentCommander:
    """Role changes by the agents' commands."""

    def __init__(self, agents: AgentLinks, deadline_s: float) -> None:
        """deadline_s: for the requests that a server has."""
        self._agents, self._deadline_s = agents, deadline_s

    async def switch(self, site: str, server: str, role: ServerRole) -> RoleResult:
        try:
            answer = await self._agents.command(site, SwitchRole(server, role), self._deadline_s)
        except PrfaasError as error:
            return RoleResult(False, str(error))
        return RoleResult(answer.done, answer.message)


class Roles:
    """The loops of all PD sites. Belongs to one event loop."""

    def __init__(
        self,
        config: RouterConfig,
        observation: Observation,
        agents: AgentLinks,
        loads: LoadSource,
        held_s: Callable[[str], float],
        clock: Clock | None = None,
    ) -> None:
        """held_s: seconds of local prefill, on one server, that wait in the router for a site.

        Raises ConfigError for a profile without decode figures where the configuration asks to solve over them."""
        limits, views = config.policy.roles, observation.sites
        commander = AgentCommander(agents, limits.drain_timeout_s)
        self._clock = clock or MonotonicClock()
        self._loops = {
            site.name: RoleLoop(
                site=next(view for view in views if view.name == site.name),
                others=[view for view in views if view.name != site.name],
                policy=RolePolicy(_capacity(config, site), limits),
                source=loads,
                commander=commander,
                clock=self._clock,
                interval_s=limits.interval_s,
                link_gbps=partial(_link_gbps, observation, site.name),
                held_s=partial(held_s, site.name),
            )
            for site in config.sites
            if limits.enabled and site.role == "pd" and site.reports_port
        }
        self._tasks: list[asyncio.Task[None]] = []

    def __bool__(self) -> bool:
        return bool(self._loops)

    def start(self) -> None:
        self._tasks = [asyncio.create_task(loop.run()) for loop in self._loops.values()]
        for task in self._tasks:
            task.add_done_callback(_ended)

    async def stop(self) -> None:
        """A change under way goes on at its agent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def arrived(self, decision: Decision) -> None:
        """A request was routed."""
        if decision.decode is not None and (loop := self._loops.get(decision.decode.site)) is not None:
            loop.tally.arrived(decision.uncached_tokens)

    def describe(self) -> dict[str, Any]:
        """The last looks of each site, newest first, for `GET /policy`. `age_s`: how long ago."""
        now_s = self._clock.now_s()
        return {
            site: [
                {**msgspec.structs.asdict(decision), "age_s": round(now_s - decision.at_s, 3)}
                for decision in reversed(loop.decisions)
            ]
            for site, loop in self._loops.items()
        }

    def gauges(self) -> list[Gauge]:
        """Figures for `/metrics`, of each site's last look."""
        seen = {site: loop.decisions[-1].load for site, loop in self._loops.items() if loop.decisions}
        loads = {site: load for site, load in seen.items() if load is not None}
        changes = {key: count for loop in self._loops.values() for key, count in loop.changes.items()}
        by_role = ("site", "role")
        return [
            (
                "prfaas_router_role_servers",
                "Servers of a PD site in each role.",
                by_role,
                [
                    ((site, role), count)
                    for site, load in loads.items()
                    for role, count in (("prefill", load.n_p), ("decode", load.n_d))
                ],
            ),
            (
                "prfaas_router_role_busy",
                "Share of a role's servers in use, over the last interval.",
                by_role,
                [
                    ((site, role), share)
                    for site, load in loads.items()
                    for role, share in (("prefill", load.prefill_busy), ("decode", load.decode_busy))
                ],
            ),
            (
                "prfaas_router_role_changes",
                "Role changes that the router has commanded.",
                ("site", "role", "result"),
                list(changes.items()),
            ),
        ]


def _capacity(config: RouterConfig, site: RouterSite) -> RoleCapacity:
    """Measured; with a speed promised to each request, solved over the profile and the recent lengths."""
    slo_tokens_per_s = config.policy.roles.slo_tokens_per_s
    if not slo_tokens_per_s or not config.policy.is_live:
        return MeasuredCapacity()
    profile = router_profile(config)
    far = next((other for other in config.sites if other.role == "prfaas"), None)
    hardware = site.hardware or next(iter(profile.prefill))
    fleet = Fleet(
        kv=profile.kv,
        pd_prefill=site_curve(profile, site.name, site.hardware),
        pd_decode=profile.decode_on(hardware),
        n_pd=2,
        prfaas_prefill=site_curve(profile, far.name, far.hardware) if far is not None else None,
        n_prfaas=0,
    )
    return SolvedCapacity(fleet, slo_tokens_per_s=slo_tokens_per_s)


def _link_gbps(observation: Observation, home: str) -> float:
    return sum(bytes_per_s_to_gbps(link.bytes_per_s) for (_, to), link in observation.links.items() if to == home)


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("roles stay as they are from now on", exc_info=error)
