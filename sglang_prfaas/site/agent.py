"""The agent: the HTTP endpoint of a site for routers.

    GET /health                       200 while at least one server is ready, else 503
    GET /site                         the site's servers and their states
    GET /metrics                      Prometheus
    ANY /servers/<name>/<anything>    relayed to that server, byte for byte

A PrfaaS site is reached over a WAN: there only inference and read-only endpoints are relayed, not SGLang's admin API.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

import msgspec

from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.http import Client, ClientLimits, HttpError, HttpServer, Request, Response, ServerLimits, relay
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.roles import Roles
from sglang_prfaas.site.server import Server

WAN_PATHS: Mapping[str, frozenset[str]] = {
    "POST": frozenset(
        (
            "/generate",
            "/v1/chat/completions",
            "/v1/completions",
            "/v1/messages",
            "/v1/responses",
        )
    ),
    "GET": frozenset(
        (
            "/get_model_info",
            "/health",
            "/health_generate",
            "/metrics",
            "/model_info",
            "/ping",
            "/ready",
            "/v1/loads",
            "/v1/models",
        )
    ),
}
"""What is relayed to the servers of a PrfaaS site, by method."""

_PREFIX = "/servers/"
_TEXT = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
_LIMITS = ServerLimits(max_body_bytes=1 << 30)
_CLIENT_LIMITS = ClientLimits(first_byte_timeout_s=86_400.0, idle_timeout_s=86_400.0)
"""Routers set the deadlines of requests; the agent only has to outlast them."""


class ServerReport(msgspec.Struct, frozen=True):
    """One server in the answer to `GET /site`. bootstrap_host: empty means the host that the agent is reached at."""

    name: str
    role: str
    state: str
    path: str
    bootstrap_host: str
    bootstrap_port: int
    restarts: int


class SiteReport(msgspec.Struct, frozen=True):
    """The answer to `GET /site`."""

    name: str
    role: str
    model: str
    served_model_name: str
    draining: bool
    servers: list[ServerReport]


class Agent:
    """Serves one site's routers. Must be used from one event loop."""

    def __init__(self, config: SiteConfig, servers: Mapping[str, Server]) -> None:
        self._config = config
        self._servers = servers
        self._server: HttpServer | None = None
        self._client: Client | None = None
        self._roles = Roles(servers, config.limits.health_interval_s)
        self._watching: asyncio.Task[None] | None = None
        self._relayed = dict.fromkeys(servers, 0)
        self.draining = False
        """While set, nothing new is relayed; requests under way go on."""

    async def start(self) -> int:
        """Listen; returns the port. Raises LocalError when the address is taken."""
        self._client = Client(_CLIENT_LIMITS)
        self._watching = asyncio.create_task(self._roles.watch(self._client))
        self._server = HttpServer(self._handle, _LIMITS)
        agent = self._config.agent
        return await self._server.start(agent.host, agent.port)

    async def stop(self, timeout_s: float) -> None:
        """Finish what is under way within the time, then close."""
        self.draining = True
        if self._server is not None:
            await self._server.drain(timeout_s)
            self._server = None
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
            self._watching = None
        if self._client is not None:
            await self._client.close()
            self._client = None

    def report(self) -> SiteReport:
        """What `GET /site` answers."""
        site = self._config.site
        return SiteReport(
            name=site.name,
            role=site.role,
            model=site.model,
            served_model_name=site.served_model_name or site.model,
            draining=self.draining,
            servers=[
                ServerReport(
                    name=server.name,
                    role=self._roles.of(server.name),
                    state=str(State.STOPPING if self.draining else self._servers[server.name].state),
                    path=_PREFIX + server.name,
                    bootstrap_host=self._config.transport.advertise_host or _reachable(server.host),
                    bootstrap_port=self._servers[server.name].command.bootstrap_port,
                    restarts=self._servers[server.name].restarts,
                )
                for server in self._config.servers
            ],
        )

    def metrics(self) -> str:
        """What `GET /metrics` answers."""
        site = self._config.site.name
        lines = ["# HELP prfaas_server_state Whether a server is in a state.", "# TYPE prfaas_server_state gauge"]
        for server in self._servers.values():
            labels = f'site="{site}",server="{server.name}",role="{self._roles.of(server.name)}"'
            lines += [
                f'prfaas_server_state{{{labels},state="{state}"}} {int(server.state is state)}' for state in State
            ]
        lines += [
            "# HELP prfaas_server_restarts_total Restarts of a server since the site was started.",
            "# TYPE prfaas_server_restarts_total counter",
        ]
        lines += [
            f'prfaas_server_restarts_total{{site="{site}",server="{server.name}"}} {server.restarts}'
            for server in self._servers.values()
        ]
        lines += [
            "# HELP prfaas_agent_relayed_requests_total Requests relayed to a server.",
            "# TYPE prfaas_agent_relayed_requests_total counter",
        ]
        lines += [
            f'prfaas_agent_relayed_requests_total{{site="{site}",server="{name}"}} {count}'
            for name, count in self._relayed.items()
        ]
        return "\n".join(lines) + "\n"

    async def _handle(self, request: Request, response: Response) -> None:
        if request.path.startswith(_PREFIX):
            await self._relay(request, response)
        elif request.method not in ("GET", "HEAD"):
            raise HttpError(405, f"{request.path} answers GET only.", code="method_not_allowed")
        elif request.path == "/health":
            ready = any(server.state is State.READY for server in self._servers.values()) and not self.draining
            response.send(200 if ready else 503, b'{"ready":%b}' % (b"true" if ready else b"false"))
        elif request.path == "/site":
            response.send(200, msgspec.json.encode(self.report()))
        elif request.path == "/metrics":
            response.send(200, self.metrics().encode(), (_TEXT,))
        else:
            raise HttpError(404, f"No such path: {request.path}. See /site.", code="not_found")

    async def _relay(self, request: Request, response: Response) -> None:
        raw = request.target[len(_PREFIX) :]
        name, slash, rest = raw.partition(b"/")
        server = self._servers.get(name.decode("latin-1"))
        if not request.target.startswith(_PREFIX.encode()) or server is None:
            raise HttpError(404, f"No such server; site {self._config.site.name} has {', '.join(self._servers)}.")
        target = slash + rest
        path = unquote_to_bytes(target.partition(b"?")[0]).decode("latin-1")
        if self._config.site.role == "prfaas" and path not in WAN_PATHS.get(request.method, ()):
            raise HttpError(403, f"{request.method} {path} is not relayed to a PrfaaS site.", code="not_relayed")
        if self.draining:
            raise HttpError(503, f"Site {self._config.site.name} is stopping.", code="draining")
        if server.pid is None:
            raise HttpError(503, f"Server {server.name} is {server.state}.", code="server_unavailable")
        assert self._client is not None
        self._relayed[server.name] += 1
        await relay(request, response, self._client.upstream(server.url), target=target or b"/")


def _reachable(host: str) -> str:
    """An address to tell others; empty where the server listens on all and the configuration names none."""
    return "" if host in ("", "0.0.0.0", "::", "[::]") else host
