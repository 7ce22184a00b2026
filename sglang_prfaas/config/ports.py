"""Which ports a configuration claims, and which of them clash."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Sequence

from msgspec import Struct

from sglang_prfaas.config import sglang_args
from sglang_prfaas.config.schema import RouterConfig, ServerConfig, SiteConfig

_DP_ATTENTION_OFFSET = 233
_DP_ATTENTION_PORTS = 8


class PortClaim(Struct, frozen=True):
    """Ports `first` to `last` on `host`, claimed by one part of a configuration.

    what: for messages, `bootstrap of server prefill-0`.
    key: dotted path of the key that sets the port, for messages.
    source: file of the claim, empty where there is none.
    """

    host: str
    first: int
    last: int
    what: str
    key: str
    source: str = ""

    @property
    def ports(self) -> str:
        return f"port {self.first}" if self.first == self.last else f"ports {self.first}-{self.last}"


def site_claims(config: SiteConfig, source: str = "") -> list[PortClaim]:
    """Every port that the processes of a site listen on; those the system picks (0) are left out."""
    claims: list[PortClaim] = []
    for server in config.servers:
        claims += _server_claims(config, server, source)
    agent = config.agent
    if agent.port:
        claims.append(PortClaim(agent.host, agent.port, agent.port, "the agent", "agent.port", source))
    if agent.reports_port:
        port = agent.reports_port
        claims.append(PortClaim(agent.host, port, port, "the agent's reports", "agent.reports_port", source))
    if (cache := config.prefix_cache).serve_port:
        host = cache.serve_host or agent.host
        key = "prefix_cache.serve_port"
        claims.append(PortClaim(host, cache.serve_port, cache.serve_port, "the prefix cache", key, source))
    return claims


def claims_for_others(config: SiteConfig) -> list[PortClaim]:
    """Those that other sites, routers among them, may have to reach: bootstraps, movers, the agent, the prefix cache;
    not SGLang itself."""
    own = {(server.host, server.port) for server in config.servers}
    return [
        claim
        for claim in site_claims(config)
        if (claim.host, claim.first) not in own and not claim.what.startswith("data-parallel")
    ]


def router_claims(config: RouterConfig, source: str = "") -> list[PortClaim]:
    """The port of a router."""
    router = config.router
    return [PortClaim(router.host, router.port, router.port, "the router", "router.port", source)]


def clashes(claims: Sequence[PortClaim]) -> Iterator[tuple[PortClaim, PortClaim]]:
    """Every pair of claims that cannot both be had on one host."""
    for index, one in enumerate(claims):
        for other in claims[:index]:
            if one.first <= other.last and other.first <= one.last and same_address(one.host, other.host):
                yield other, one


def same_address(one: str, other: str) -> bool:
    """Whether two listening addresses overlap: equal, or one of them listens on all."""
    return one == other or _wildcard(one) or _wildcard(other) or _canonical(one) == _canonical(other)


def certainly_one_host(claims: Iterable[PortClaim]) -> bool:
    """Whether claims of different files are meant for one machine: none of them listens on all addresses."""
    return not any(_wildcard(claim.host) for claim in claims)


def _server_claims(config: SiteConfig, server: ServerConfig, source: str) -> Iterator[PortClaim]:
    args = [*config.site.args, *server.args]
    key = f"servers.{server.name}"
    yield PortClaim(server.host, server.port, server.port, f"server {server.name}", f"{key}.port", source)
    if server.bootstrap_port:
        port = server.bootstrap_port
        yield PortClaim(
            server.host, port, port, f"the bootstrap of server {server.name}", f"{key}.bootstrap_port", source
        )
    if server.mover_port:
        last = server.mover_port + 2 * sglang_args.rank_count(args) - 1
        host = config.transport.bind_host or server.host
        yield PortClaim(
            host, server.mover_port, last, f"the mover of server {server.name}", f"{key}.mover_port", source
        )
    if sglang_args.has(args, "--enable-dp-attention") and not sglang_args.has(args, "--dist-init-addr"):
        first = server.port + _DP_ATTENTION_OFFSET
        what = f"data-parallel attention of server {server.name}"
        yield PortClaim("127.0.0.1", first, first + _DP_ATTENTION_PORTS - 1, what, f"{key}.port", source)


def _wildcard(host: str) -> bool:
    return host in ("", "0.0.0.0", "::", "[::]")


def _canonical(host: str) -> str:
    host = host.strip("[]")
    if host == "localhost":
        return "127.0.0.1"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host
