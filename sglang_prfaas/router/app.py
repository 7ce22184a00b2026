"""The router: its parts, its endpoints, start and stop."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from sglang_prfaas.config.schema import RouterConfig
from sglang_prfaas.http import (
    Client,
    ClientLimits,
    HttpError,
    HttpServer,
    Request,
    Response,
    ServerLimits,
    relay,
)
from sglang_prfaas.http.messages import safe_header_value
from sglang_prfaas.monitor.cache_reports import CacheUpdate
from sglang_prfaas.monitor.load_source import LoadSource
from sglang_prfaas.monitor.reports import SiteState
from sglang_prfaas.router.access_log import AccessLog
from sglang_prfaas.router.agent_links import AgentLinks
from sglang_prfaas.router.agent_tls import require_agents
from sglang_prfaas.router.body import new_request_id
from sglang_prfaas.router.cache_feed import CacheFeed, is_fed
from sglang_prfaas.router.filters import (
    DROPPED_REQUEST_HEADERS,
    ENDPOINTS,
    check_method,
    check_passthrough,
    newest_wanted,
)
from sglang_prfaas.router.health import HealthMonitor
from sglang_prfaas.router.metrics import Gauge, Metrics
from sglang_prfaas.router.models import Models
from sglang_prfaas.router.policy import make_policy
from sglang_prfaas.router.prefix_lookup import PrefixIndex
from sglang_prfaas.router.prefixes import NoPrefixes, PrefixLookup
from sglang_prfaas.router.proxy import PdProxy
from sglang_prfaas.router.registry import Registry, Target
from sglang_prfaas.router.roles import Roles
from sglang_prfaas.router.tenancy import Tenants
from sglang_prfaas.router.tokens import TokenCounter

log = logging.getLogger(__name__)

_JSON = ((b"content-type", b"application/json"),)


class Router:
    """All parts of one router. Must be made in the event loop it runs in."""

    def __init__(
        self,
        config: RouterConfig,
        counter: TokenCounter,
        access_log: AccessLog | None = None,
        *,
        loads: LoadSource | None = None,
        prefixes: PrefixLookup | None = None,
    ) -> None:
        """`loads`: reports of monitors, None for those of the agents. `prefixes`: an index of cached prefixes, if any.

        Raises ConfigError for a policy whose profile does not fit.
        """
        limits = config.limits
        self.config = config
        self.counter = counter
        self.metrics = Metrics()
        self.client = Client(
            ClientLimits(
                connect_timeout_s=limits.connect_timeout_s,
                first_byte_timeout_s=limits.first_byte_timeout_s,
                idle_timeout_s=limits.idle_timeout_s,
            )
        )
        require_agents(self.client, config.sites, config.reports)
        self.registry = Registry(config, self.client)
        self.agents = AgentLinks(config.sites, config.reports, on_state=self._reported, on_cache=self._cache_updated)
        self.health = HealthMonitor(config, self.registry, self.agents.reports.fresh)
        self.models = Models(
            (config.router.served_model_name, config.router.model),
            self.registry,
            now_s=self.client.loop.time,
            timeout_s=limits.health_timeout_s,
        )
        self.access_log = access_log or AccessLog()
        self.feed: CacheFeed | None = None
        if prefixes is None and config.prefix_index.enabled and is_fed(config):
            prefixes = index = PrefixIndex(config, self.models.adapter_id)
            self.feed = CacheFeed(config, index, self.agents)
        self.prefixes = prefixes or NoPrefixes()
        self.tenants = Tenants(config)
        loads = loads or self.agents.reports
        self.policy = make_policy(config, self.registry, loads, self.prefixes)
        line = self.policy.line
        held_s = line.local_work_s if line is not None else lambda site: 0.0
        self.roles = Roles(config, self.registry.observation, self.agents, loads, held_s)
        self.proxy = PdProxy(
            config,
            self.registry,
            counter,
            self.models,
            self.metrics,
            self.access_log,
            self.policy,
            self.prefixes,
            self.tenants,
            self.roles.arrived if self.roles else None,
        )
        self.server = HttpServer(
            self.handle,
            ServerLimits(
                max_body_bytes=limits.max_body_bytes,
                max_header_bytes=limits.max_header_bytes,
                max_connections=limits.max_connections,
                keepalive_timeout_s=limits.keepalive_timeout_s,
            ),
            on_refused=lambda error: self.metrics.refused.add((str(error.status),)),
        )
        self._draining = False

    async def start(self) -> int:
        """Begin health checks, listen; returns the port."""
        self.health.start()
        self.agents.start()
        if self.feed is not None:
            self.feed.start()
        self.roles.start()
        return await self.server.start(self.config.router.host, self.config.router.port)

    async def stop(self) -> None:
        """Refuse new work, finish what is running within drain_timeout_s, close."""
        self._draining = True
        if not await self.server.drain(self.config.limits.drain_timeout_s):
            log.warning("requests were cut off: they took longer than drain_timeout_s to end")
        if self.feed is not None:
            await self.feed.stop()
        await self.roles.stop()
        await self.agents.stop()
        await self.health.stop()
        await self.client.close()
        self.access_log.flush()

    # --- endpoints --------------------------------------------------------------------------------------------------

    async def handle(self, request: Request, response: Response) -> None:
        """Every request of every client."""
        own = request.header(b"x-request-id")
        request_id = safe_header_value(own.decode("latin-1")[:128]) if own else b""
        if not request_id:
            request_id = new_request_id()
        response.extra_headers = [(b"x-request-id", request_id)]
        try:
            path = request.path
            check_method(request)
            endpoint = ENDPOINTS.get(path)
            if endpoint is not None:
                await self.proxy.handle(request, response, endpoint, request_id)
            elif path == "/health":
                self._health(response)
            elif path == "/metrics":
                text = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),)
                response.send(200, self.metrics.render(self._gauges()), text)
            elif path == "/policy":
                response.send(200, msgspec.json.encode(self._policy()), _JSON)
            elif path == "/cache":
                response.send(200, msgspec.json.encode(self.prefixes.describe()), _JSON)
            elif path == "/decisions":
                response.send(200, self.proxy.decisions.render(newest_wanted(request)), _JSON)
            else:
                await self._pass_through(request, response)
        except HttpError as exc:
            if request.path not in ENDPOINTS:
                self.metrics.refused.add((str(exc.status),))
            raise

    async def _pass_through(self, request: Request, response: Response) -> None:
        """Everything else goes to the PD site: to its least loaded decode server."""
        check_passthrough(request.path, allow_admin=self.config.router.allow_admin)
        sites = self.tenants.sites(self.tenants.of(request)) if request.method == "POST" else None
        decodes = [t for t in self._alive("decode") if sites is None or t.site in sites]
        if not decodes:
            raise HttpError(503, "No decode server of a PD site to use is alive.", code="no_decode")
        target = min(decodes, key=lambda t: t.inflight_requests)
        response.extra_headers.append((b"x-prfaas-decode", f"{target.site}/{target.name}".encode()))
        target.add_load(1)
        try:
            await relay(request, response, target.upstream, drop_request_headers=DROPPED_REQUEST_HEADERS)
        except HttpError as exc:
            if exc.code == "upstream_unreachable":
                target.suspect(exc.message)
            raise
        finally:
            target.add_load(-1)

    def _health(self, response: Response) -> None:
        """200 only while requests can be served: a decode server and any prefill server are alive."""
        servers = [
            {"site": t.site, "name": t.name, "role": t.role, "alive": t.alive, "error": t.error or None}
            for t in self.registry.targets()
        ]
        prefills = [t for t in self.registry.targets() if t.role == "prefill" and t.alive]
        missing = [
            text
            for text, there in (("no decode server", self._alive("decode")), ("no prefill server", prefills))
            if not there
        ]
        if self._draining:
            missing.append("the router is stopping")
        status = "ok" if not missing else "; ".join(missing)
        body = {
            "status": status,
            "threshold_tokens": self.registry.observation.t_tokens,
            "servers": servers,
            "agent_errors": self.health.agent_errors,
        }
        response.send(200 if not missing else 503, msgspec.json.encode(body), _JSON)

    def _cache_updated(self, update: CacheUpdate) -> None:
        if self.feed is not None:
            self.feed.updated(update)

    def _policy(self) -> dict[str, Any]:
        """What is in force: the short timescale, and the last looks of the long one where it runs."""
        return {**self.policy.describe(self.client.loop.time()), "roles": self.roles.describe()}

    def _reported(self, state: SiteState) -> None:
        self.health.reported(state)

    def _alive(self, role: str) -> list[Target]:
        """Alive servers of a role at PD sites."""
        pd_sites = {site.name for site in self.registry.observation.sites if site.role == "pd"}
        return [t for t in self.registry.targets() if t.role == role and t.alive and t.site in pd_sites]

    def _gauges(self) -> list[Gauge]:
        targets = [((t.site, t.name, t.role), t) for t in self.registry.targets()]
        labels = ("site", "server", "role")
        return [
            (
                "prfaas_router_server_up",
                "1 while the server takes requests.",
                labels,
                [(k, t.alive) for k, t in targets],
            ),
            (
                "prfaas_router_inflight_requests",
                "Requests in work per server.",
                labels,
                [(k, t.inflight_requests) for k, t in targets],
            ),
            (
                "prfaas_router_inflight_prefill_tokens",
                "Uncached prompt tokens in work per prefill server.",
                labels,
                [(k, t.inflight_tokens) for k, t in targets if t.role == "prefill"],
            ),
            (
                "prfaas_router_threshold_tokens",
                "t: uncached lengths above it go to a PrfaaS site.",
                (),
                [((), self.registry.observation.t_tokens)],
            ),
            ("prfaas_router_connections", "Client connections.", (), [((), self.server.connections)]),
            (
                "prfaas_router_bytes_per_token",
                "Calibrated bytes of JSON per prompt token.",
                (),
                [((), self.counter.bytes_per_token)],
            ),
            (
                "prfaas_router_lost_log_lines",
                "Lines of the request log that could not be written.",
                (),
                [((), self.access_log.lost_lines)],
            ),
            *self.policy.gauges(self.client.loop.time()),
            *self.prefixes.gauges(),
            *self.roles.gauges(),
        ]
