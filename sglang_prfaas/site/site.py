"""One datacenter, running: its servers and its agent."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config import ports, sglang_args
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.core.addresses import base_url
from sglang_prfaas.monitor.kv_subscriber import KvEventSource
from sglang_prfaas.monitor.link_channel import new_endpoint
from sglang_prfaas.monitor.owned_directory import new_path, remove_abandoned
from sglang_prfaas.site import kv_event_endpoints
from sglang_prfaas.site.agent import Agent
from sglang_prfaas.site.cache_watch import CacheWatch
from sglang_prfaas.site.commands import listening_host, site_commands
from sglang_prfaas.site.free_ports import require_free
from sglang_prfaas.site.progress import Progress
from sglang_prfaas.site.server import Server
from sglang_prfaas.site.supervisor import Supervisor

logger = logging.getLogger(__name__)


class Site:
    """Starts a site's servers and agent, keeps them up, and stops them in order.

    All methods belong to one event loop; `running` drives sites from plain code.
    """

    def __init__(
        self,
        config: SiteConfig,
        *,
        log_dir: Path | None = None,
        environ: Mapping[str, str] | None = None,
        python: str = sys.executable,
        progress: Progress | None = None,
    ) -> None:
        """log_dir: over the configuration's. environ: what servers inherit (None: this process's environment)."""
        self.config = config
        self.name = config.site.name
        self.log_dir = log_dir or default_log_dir(config)
        self._progress = progress or Progress(self.name)
        self._claims = ports.site_claims(config)
        has_links = bool(config.agent.port) and config.site.transfer_backend == "prfaas"
        link_reports = new_endpoint() if has_links else ""
        caches, kv_events = _caches(config)
        self.supervisor = Supervisor(
            site_commands(config, python, link_reports, kv_events),
            config.limits,
            self.log_dir,
            environ=environ,
            avoid_ports=[port for claim in self._claims for port in range(claim.first, claim.last + 1)],
            progress=self._progress,
        )
        self.agent = Agent(config, self.servers, link_reports=link_reports, caches=caches)
        self.supervisor.on_change = self.agent.changed

    @property
    def servers(self) -> dict[str, Server]:
        """The servers by name."""
        return self.supervisor.servers

    @property
    def agent_url(self) -> str:
        """Base URL of the agent on this machine; empty without one."""
        agent = self.config.agent
        if not agent.port:
            return ""
        return base_url("https" if agent.tls else "http", listening_host(agent.host), agent.port)

    async def start(self) -> None:
        """Check that every port is free, remove what a killed launcher left, start agent and servers, wait for all.

        The agent answers from the beginning, and reports servers as starting. Raises LaunchError, and LocalError when
        the agent cannot listen; nothing is left running then.
        """
        require_free(self._claims)
        for path in await asyncio.to_thread(remove_abandoned):
            logger.info("site %s: removed %s, whose launcher was killed", self.name, path)
        if self.config.agent.port:
            await self.agent.start()
        try:
            await self.supervisor.start()
        except BaseException:
            await self.agent.stop(0)
            raise

    async def stop(self, *, at_once: bool = False) -> None:
        """Stop in order: nothing new is relayed, prefill servers drain and end, then decode servers, then the agent.

        at_once: kill everything instead.
        """
        self.agent.draining = True
        await self.supervisor.stop(at_once=at_once)
        await self.agent.stop(0 if at_once else 1.0)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


def _caches(config: SiteConfig) -> tuple[CacheWatch, dict[str, str]]:
    """The watch over the servers' caches, which hears no events where no router could ask, and `--kv-events-config` by
    server."""
    cache = config.prefix_cache
    stats = cache.stats_dir or (f"{cache.disk_dir}/stats" if cache.disk_dir else "")
    stats = stats if cache.backend != "off" else ""
    if not (config.agent.kv_events and config.agent.reports_port):
        return CacheWatch(config.site.name, {}, 1, MonotonicClock(), store_stats=stats), {}
    directory = str(new_path())
    options: dict[str, str] = {}
    sources: dict[str, list[KvEventSource]] = {}
    for number, server in enumerate(config.servers):
        args = (*config.site.args, *server.args)
        if sglang_args.has(args, kv_event_endpoints.OPTION):
            events = kv_event_endpoints.given_config(args)
        else:
            events = kv_event_endpoints.chosen_config(args, directory, number)
            options[server.name] = kv_event_endpoints.option(events)[1]
        if events is not None:
            ranks, host = sglang_args.data_parallel_size(args), listening_host(server.host)
            sources[server.name] = kv_event_endpoints.sources(config.site.name, server.name, events, ranks, host)
    watch = CacheWatch(
        config.site.name,
        sources,
        config.agent.kv_events_max_blocks,
        MonotonicClock(),
        directory=directory,
        store_stats=stats,
    )
    return watch, options


def default_log_dir(config: SiteConfig) -> Path:
    """Where a site's logs go: what the configuration says, or else below the current directory."""
    return Path(config.site.log_dir) if config.site.log_dir else Path(".prfaas", "logs", config.site.name)
