"""What may stand where a host or a URL is wanted. Pure: nothing is looked up."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from sglang_prfaas.config.schema import RouterConfig, SiteConfig

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+")
_EXAMPLES = 'write for example "10.2.0.21", "fd00::21" or "node7.example.org"'


def host_problem(host: str) -> str:
    """What is wrong with a host, as a message; empty where nothing is. Brackets around an IPv6 address are allowed."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if _is_address(bare):
        return ""
    labels = bare.removesuffix(".").split(".")
    if "://" in bare or "/" in bare:
        return f"{host!r} is a URL or a path, not a host; {_EXAMPLES}"
    if bare.count(":") == 1 and not host_problem(bare.partition(":")[0]):
        return f"{host!r} has a port; write {bare.partition(':')[0]!r}, ports have keys of their own"
    if len(bare) > 253 or not all(map(_LABEL.fullmatch, labels)) or _NUMBER.fullmatch(labels[-1]):
        return f"{host!r} is neither an address nor a name; {_EXAMPLES}"
    return ""


def network_problem(text: str) -> str:
    """The same for a place in peers.toml: a host, or a network such as 10.2.0.0/24."""
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        if "/" in text:
            return f"{text!r} is no network; write for example 10.2.0.0/24 or fd00::/64"
        return host_problem(text)
    return ""


def url_problem(url: str) -> str:
    """What is wrong with a base URL of an agent or a server, as a message; empty where nothing is."""
    if "://" not in url:
        return f'write "http://{url}"'
    if not url.startswith(("http://", "https://")):
        return f"{url!r} begins with neither http:// nor https://; write one of them"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as error:
        return f"{url!r} is no URL: {error}; write for example http://10.2.0.20:9000, or http://[fd00::20]:9000"
    return host_problem(host)


def site_addresses(config: SiteConfig) -> Iterator[tuple[str, str, bool]]:
    """Path and text of every host of a site that is none; all are fatal."""
    hosts = [(f"servers.{server.name}.host", server.host) for server in config.servers]
    hosts += [(f"transport.{key}", getattr(config.transport, key)) for key in ("bind_host", "advertise_host")]
    hosts += [("agent.host", config.agent.host), ("prefix_cache.serve_host", config.prefix_cache.serve_host)]
    hosts += [(f"prefix_cache.peers.{peer.name}.host", peer.host) for peer in config.prefix_cache.peers]
    for path, host in hosts:
        if host and (text := host_problem(host)):
            yield path, text, True


def router_addresses(config: RouterConfig) -> Iterator[tuple[str, str, bool]]:
    """Path and text of every host and URL of a router that is none; all are fatal."""
    found = [("router.host", host_problem(config.router.host) if config.router.host else "")]
    for site in config.sites:
        if site.agent_url:
            found.append((f"sites.{site.name}.agent_url", url_problem(site.agent_url)))
        for server in site.servers:
            path = f"sites.{site.name}.servers.{server.name}"
            found.append((f"{path}.url", url_problem(server.url)))
            if server.bootstrap_host:
                found.append((f"{path}.bootstrap_host", host_problem(server.bootstrap_host)))
    yield from ((path, text, True) for path, text in found if text)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    return True
