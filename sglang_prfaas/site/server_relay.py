"""`/servers/<name>/<anything>`: requests relayed to the site's servers, byte for byte."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import unquote_to_bytes

from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.http import Client, HttpError, Request, Response, relay
from sglang_prfaas.site.control import SiteControl
from sglang_prfaas.site.server import Server

PREFIX = "/servers/"
"""Of the paths that are relayed; a server's name follows."""

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


class ServerRelay:
    """Relays to the servers of one site, and counts what it relays."""

    def __init__(self, config: SiteConfig, servers: Mapping[str, Server], control: SiteControl) -> None:
        self._site = config.site
        self._servers = servers
        self._control = control
        self.relayed = dict.fromkeys(servers, 0)
        """Requests so far, by server."""

    async def handle(self, request: Request, response: Response, client: Client, *, draining: bool) -> None:
        """Relay one request. draining: whether the site takes nothing new. Raises HttpError for what is not relayed."""
        raw = request.target[len(PREFIX) :]
        name, slash, rest = raw.partition(b"/")
        server = self._servers.get(name.decode("latin-1"))
        if not request.target.startswith(PREFIX.encode()) or server is None:
            raise HttpError(404, f"No such server; site {self._site.name} has {', '.join(self._servers)}.")
        target = slash + rest
        path = unquote_to_bytes(target.partition(b"?")[0]).decode("latin-1")
        if self._site.role == "prfaas" and path not in WAN_PATHS.get(request.method, ()):
            raise HttpError(403, f"{request.method} {path} is not relayed to a PrfaaS site.", code="not_relayed")
        if draining:
            raise HttpError(503, f"Site {self._site.name} is stopping.", code="draining")
        if server.pid is None:
            raise HttpError(503, f"Server {server.name} is {server.state}.", code="server_unavailable")
        upstream = client.upstream(server.url)
        self.relayed[server.name] += 1
        if request.method != "POST":
            await relay(request, response, upstream, target=target or b"/")
            return
        refused = self._control.refuses(server.name)
        if refused:
            raise HttpError(503, refused, code="draining")
        self._control.relayed[server.name] += 1
        try:
            await relay(request, response, upstream, target=target or b"/")
        finally:
            self._control.relayed[server.name] -= 1
