"""Health checks of every server, and the servers' lists of the sites' agents.

SGLang's `/ready` answers from the server's own state at no cost; `/health` generates a token and takes a second or
more. So `/ready` is asked every interval and `/health` every few; a server that is too busy to answer `/health` in time
is healthy as long as it says that it is ready.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from sglang_prfaas.config.schema import RouterConfig, RouterSite
from sglang_prfaas.errors import PeerError, PrfaasError
from sglang_prfaas.http import UpstreamError, UpstreamTimeoutError
from sglang_prfaas.monitor.reports import SiteState
from sglang_prfaas.router.registry import Registry, Target

_DEEP_EVERY = 10

log = logging.getLogger(__name__)


class HealthMonitor:
    """Runs one task per server and per agent until stopped."""

    def __init__(
        self, config: RouterConfig, registry: Registry, reports_come: Callable[[str], bool] = lambda site: False
    ) -> None:
        """reports_come: whether the agent of a site tells of its servers by itself these days."""
        self._reports_come = reports_come
        self._limits = config.limits
        self._registry = registry
        self._agents = [site for site in config.sites if site.agent_url]
        self._client = registry.client
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._agent_tasks: list[asyncio.Task[None]] = []
        self.agent_errors: dict[str, str] = {}
        """Why the agent of a site could not be asked the last time, for those sites where that is so."""

    def start(self) -> None:
        self._sync()
        self._agent_tasks = [asyncio.create_task(self._watch_agent(site)) for site in self._agents]

    def reported(self, state: SiteState) -> None:
        """An agent tells of its servers: take it over at once."""
        site = next((site for site in self._agents if site.name == state.site), None)
        if site is None:
            return
        try:
            self._registry.apply_state(site, state)
        except PeerError as exc:
            log.warning("site %s: %s", site.name, exc)
            return
        self._sync()

    async def stop(self) -> None:
        tasks = [*self._tasks.values(), *self._agent_tasks]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    def _sync(self) -> None:
        """One task for each server that is listed, none for the others."""
        targets = {target.key: target for target in self._registry.targets()}
        for key, target in targets.items():
            if key not in self._tasks or self._tasks[key].done():
                self._tasks[key] = asyncio.create_task(self._watch(target))
        for key in list(self._tasks):
            if key not in targets:
                self._tasks.pop(key).cancel()

    async def _watch_agent(self, site: RouterSite) -> None:
        upstream = self._client.upstream(site.agent_url)
        while True:
            try:
                answer = await upstream.fetch("GET", "/site", timeout_s=self._limits.health_timeout_s)
                if answer.status != 200:
                    raise PeerError(f"the agent of {site.name} at {site.agent_url} answered {answer.status}")
                if not self._reports_come(site.name):  # else the report may be newer than this answer
                    self._registry.apply_agent(site, answer.body)
                    self._sync()
                self.agent_errors.pop(site.name, None)
            except PrfaasError as exc:  # its servers stay as they are; their own checks go on
                if site.name not in self.agent_errors:
                    log.warning("site %s: %s", site.name, exc)
                self.agent_errors[site.name] = str(exc)
            await asyncio.sleep(self._limits.health_interval_s)

    async def _watch(self, target: Target) -> None:
        count = 0
        while True:
            target.probe_now.clear()
            await self._check(target, deep=count % _DEEP_EVERY == 0)
            count += 1
            try:
                async with asyncio.timeout(self._limits.health_interval_s):
                    await target.probe_now.wait()
            except TimeoutError:
                pass  # the interval is over

    async def _check(self, target: Target, *, deep: bool) -> None:
        try:
            ready = await self._ask(target, "/ready")
            if ready == 404 or (deep and ready == 200):  # 404: a server without /ready
                try:
                    status = await self._ask(target, "/health")
                except UpstreamTimeoutError:
                    if ready == 404:
                        raise
                    status = ready  # busy, but ready
            else:
                status = ready
        except UpstreamError as exc:
            target.mark_failed(str(exc), unhealthy_after=self._limits.unhealthy_after)
            return
        if status == 200:
            target.mark_healthy()
        else:
            target.mark_failed(f"its health check answered {status}", unhealthy_after=self._limits.unhealthy_after)

    async def _ask(self, target: Target, path: str) -> int:
        return (await target.upstream.fetch("GET", path, timeout_s=self._limits.health_timeout_s)).status
