"""The agent: the HTTP endpoint of a site for routers.

    GET /health                       200 while at least one server is ready, else 503
    GET /site                         the site's servers and their states
    GET /cache                        what the servers' prefix caches hold
    GET /metrics                      Prometheus
    ANY /servers/<name>/<anything>    relayed to that server, byte for byte
    POST /control/<name>/<command>    drain, undrain, role, limits; from this machine, at a pd site

A PrfaaS site is reached over a WAN: there only inference and read-only endpoints are relayed, not SGLang's admin API.
Routers get the same list, loads and links as they change over ZeroMQ where there is a `reports_port`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping
from typing import Any

import msgspec

from sglang_prfaas.clock import Clock, MonotonicClock
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.config.security import beyond_this_machine
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import PrfaasError
from sglang_prfaas.http import (
    Client,
    ClientLimits,
    HttpError,
    HttpServer,
    Request,
    Response,
    ServerLimits,
    TlsPeers,
)
from sglang_prfaas.monitor.link_channel import LinkReceiver, LinkViews
from sglang_prfaas.monitor.reports import Command, ConfiguredLink, ServerState, SiteState
from sglang_prfaas.site import metrics, operator_control, server_relay
from sglang_prfaas.site.adapter_watch import AdapterWatch
from sglang_prfaas.site.cache_server import CacheServer
from sglang_prfaas.site.cache_watch import CacheWatch
from sglang_prfaas.site.control import SiteControl
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.load_watch import LoadWatch
from sglang_prfaas.site.report_server import ReportServer
from sglang_prfaas.site.reporter import Reporter
from sglang_prfaas.site.server import Server
from sglang_prfaas.site.server_relay import ServerRelay
from sglang_prfaas.transport.security import SiteTls, load_security

logger = logging.getLogger(__name__)

_TEXT = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
_LINKS_INTERVAL_S = 0.1
_LIMITS = ServerLimits(max_body_bytes=1 << 30)
_CLIENT_LIMITS = ClientLimits(first_byte_timeout_s=86_400.0, idle_timeout_s=86_400.0)
"""Routers set the deadlines of requests; the agent only has to outlast them."""


class Agent:
    """Serves one site's routers. Must be used from one event loop."""

    def __init__(
        self,
        config: SiteConfig,
        servers: Mapping[str, Server],
        *,
        clock: Clock | None = None,
        link_reports: str = "",
        caches: CacheWatch | None = None,
    ) -> None:
        """link_reports: the endpoint to take the movers' figures of links at, empty for none. caches: what the servers
        hold, None where that is not watched."""
        clock = clock or MonotonicClock()
        self._config = config
        self._servers = servers
        self._clock = clock
        self._server: HttpServer | None = None
        self._client: Client | None = None
        self._loads = LoadWatch(servers, config.agent.report_interval_s, clock, self.changed)
        self._adapters = AdapterWatch(servers, config.agent.report_interval_s, self.changed)
        self._control = SiteControl(config, servers, self._loads, clock, self.changed)
        self._link_reports = link_reports
        self._caches = caches or CacheWatch(config.site.name, {}, 1, clock)
        self._caches_of: dict[str, tuple[int | None, str]] = {}
        capacities = {link.to_site: link.capacity_gbps * 1e9 / 8 for link in config.links}
        self._links = LinkViews(clock, configured_bytes_per_s=capacities)
        self._link_receiver: LinkReceiver | None = None
        self._reports: ReportServer | None = None
        self._reporter: Reporter | None = None
        self._cache: CacheServer | None = None
        self._tasks: set[asyncio.Task[object]] = set()
        self._relay = ServerRelay(config, servers, self._control)
        self._draining = False
        self._change_pending = False

    @property
    def draining(self) -> bool:
        """While set, nothing new is relayed; requests under way go on."""
        return self._draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self._draining = value
        self.changed()

    def _peers(self) -> TlsPeers | None:
        """Whom the HTTP port serves, None for everybody. Raises ConfigError."""
        agent = self._config.agent
        if agent.tls:
            return SiteTls(load_security(self._config.transport), listens=True)
        if beyond_this_machine(agent.host):
            logger.warning(
                "the agent's port %s speaks plain HTTP: who can read the traffic reads prompts and answers; set "
                "agent.tls = true, unless the network or a proxy protects it",
                authority(agent.host, agent.port),
            )
        return None

    async def start(self) -> int:
        """Listen; returns the HTTP port. Raises LocalError when an address is taken, ConfigError for keys that do not
        fit."""
        self._client = Client(_CLIENT_LIMITS)
        self._server = HttpServer(self._handle, _LIMITS)
        agent = self._config.agent
        try:
            port = await self._server.start(agent.host, agent.port, peers=self._peers())
            if self._link_reports:
                self._link_receiver = LinkReceiver(self._link_reports)
            self._caches.start()
            if agent.reports_port:
                self._reports = ReportServer(
                    self._config,
                    self._clock,
                    on_subscribed=self.changed,
                    on_command=self._command,
                    on_read_cache=self._caches.read,
                )
                self._reporter = Reporter(self._config.site.name, self._reports.broadcast, self._execute)
                self._reports.start()
            if self._config.prefix_cache.serve_port:
                self._cache = await asyncio.to_thread(CacheServer, self._config)
        except (PrfaasError, OSError):
            await self.stop(0)
            raise
        self._spawn(self._loads.watch(self._client), "loads")
        self._spawn(self._adapters.watch(self._client), "adapters")
        self._spawn(self._report_loads(), "reports")
        return port

    async def stop(self, timeout_s: float) -> None:
        """Finish what is under way within the time, then close."""
        self.draining = True
        if self._server is not None:
            await self._server.drain(timeout_s)
            self._server = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._reports is not None:
            self._reporter = None
            await asyncio.to_thread(self._reports.stop)
            self._reports = None
        if self._link_receiver is not None:
            self._link_receiver.close()
            self._link_receiver = None
        await self._caches.stop()
        if self._cache is not None:
            await asyncio.to_thread(self._cache.close)
            self._cache = None
        if self._client is not None:
            await self._client.close()
            self._client = None

    def changed(self) -> None:
        """Something that routers should know has changed: they are told soon, once for all changes of this moment."""
        self._forget_caches()
        if self._reporter is not None and not self._change_pending:
            self._change_pending = True
            asyncio.get_running_loop().call_soon(self._report_state)

    def _forget_caches(self) -> None:
        """A process that has ended, and a change of role, take the server's cache along."""
        for name, server in self._servers.items():
            now = (server.pid, self._loads.role(name))
            known = self._caches_of.get(name)
            if known is not None and known[0] is not None and known != now:
                self._caches.server_gone(name)
            self._caches_of[name] = now

    def report(self) -> SiteState:
        """What `GET /site` answers. Epoch and sequence are those of the next report to routers, 0 without any."""
        site = self._config.site
        epoch, sequence = self._reporter.numbers() if self._reporter is not None else (0, 0)
        return SiteState(
            site=site.name,
            name=site.name,
            epoch=epoch,
            sequence=sequence,
            role=site.role,
            model=site.model,
            served_model_name=site.served_model_name or site.model,
            draining=self.draining,
            servers=[self._server_state(name) for name in self._servers],
            links=self._links.links(),
            configured_links=[
                ConfiguredLink(to_site=link.to_site, capacity_gbps=link.capacity_gbps, rtt_ms=link.rtt_ms)
                for link in self._config.links
            ],
        )

    def metrics(self) -> str:
        """What `GET /metrics` answers."""
        servers = [
            metrics.ServerFigures(
                name=name,
                role=self._loads.role(name),
                state=server.state,
                offered=self._control.state(name) == State.READY and not self.draining,
                restarts=server.restarts,
                relayed=self._relay.relayed[name],
                load=self._loads.load(name),
            )
            for name, server in self._servers.items()
        ]
        routers = self._reports.routers if self._reports is not None else 0
        text = metrics.render(
            self._config.site.name, servers, self._links.links(), self._control.results, routers, self._caches.samples()
        )
        text += metrics.render_transfers(self._links.counts())
        text += metrics.render_stores(self._config.site.name, self._caches.stores())
        return text + (metrics.render_cache(self._config.site.name, self._cache.stats()) if self._cache else "")

    def _server_state(self, name: str) -> ServerState:
        server, change = self._servers[name], self._control.change(name)
        return ServerState(
            name=name,
            role=self._loads.role(name),
            state=str(State.STOPPING) if self.draining else self._control.state(name),
            path=server_relay.PREFIX + name,
            bootstrap_host=self._config.transport.advertise_host or _reachable(server.command.host),
            bootstrap_port=server.command.bootstrap_port,
            restarts=server.restarts,
            change=change.text if change is not None else "",
            adapter_ids=self._adapters.ids(name),
        )

    # --- reports and commands -----------------------------------------------------------------------------------------

    def _report_state(self) -> None:
        self._change_pending = False
        if self._reporter is not None:
            self._reporter.send(self.report())

    async def _report_loads(self) -> None:
        """Again and again, and at once when a link gets congested, or is not any more."""
        interval_s = self._config.agent.report_interval_s
        reported_s = self._clock.now_s()
        congested: set[tuple[str, str]] = set()
        while True:
            await asyncio.sleep(min(interval_s, _LINKS_INTERVAL_S))
            if self._link_receiver is not None:
                self._link_receiver.drain(self._links)
            links = self._links.links()
            before, congested = congested, {(link.from_site, link.to_site) for link in links if link.congested}
            now_s = self._clock.now_s()
            if congested != before or now_s - reported_s >= interval_s:
                reported_s = now_s
                if self._reporter is not None:
                    self._reporter.loads(self._loads.loads(), links)

    def _command(self, command: Command, reply: operator_control.Reply) -> None:
        if self._reporter is not None:
            self._reporter.command(command, reply)

    def _execute(self, command: Command) -> asyncio.Task[tuple[bool, str]]:
        assert self._client is not None
        work = self._control.execute(command.action, command.deadline_s, self._client)
        task = asyncio.create_task(work, name=f"command {command.id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _spawn(self, work: Coroutine[Any, Any, object], name: str) -> None:
        task = asyncio.create_task(work, name=f"{name} of {self._config.site.name}")
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            logger.error("site %s: %s ended", self._config.site.name, task.get_name(), exc_info=error)

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    async def _handle(self, request: Request, response: Response) -> None:
        if request.path.startswith(server_relay.PREFIX):
            assert self._client is not None
            await self._relay.handle(request, response, self._client, draining=self.draining)
        elif request.path.startswith(operator_control.PREFIX):
            command = operator_control.command_of(request, self._config.site.role)
            done, message = await asyncio.shield(self._execute(command))
            response.send(200 if done else 409, msgspec.json.encode({"done": done, "message": message}))
        elif request.method not in ("GET", "HEAD"):
            raise HttpError(405, f"{request.path} answers GET only.", code="method_not_allowed")
        elif request.path == "/health":
            ready = any(self._control.state(name) == State.READY for name in self._servers) and not self.draining
            response.send(200 if ready else 503, b'{"ready":%b}' % (b"true" if ready else b"false"))
        elif request.path == "/site":
            response.send(200, msgspec.json.encode(self.report()))
        elif request.path == "/cache":
            served = self._cache.stats() if self._cache else None
            response.send(200, msgspec.json.encode(self._caches.describe() | {"served": served}))
        elif request.path == "/metrics":
            response.send(200, self.metrics().encode(), (_TEXT,))
        else:
            raise HttpError(404, f"No such path: {request.path}. See /site.", code="not_found")


def _reachable(host: str) -> str:
    """An address to tell others; empty where the server listens on all and the configuration names none."""
    return "" if host in ("", "0.0.0.0", "::", "[::]") else host
