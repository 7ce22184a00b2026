"""Checks across files: the sites and routers of one deployment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

from sglang_prfaas.config import ports
from sglang_prfaas.config.addresses import url_problem
from sglang_prfaas.config.checks.finding import Finding
from sglang_prfaas.config.gateway import offered_ports
from sglang_prfaas.config.schema import RouterConfig, RouterSite, SiteConfig, TransportConfig
from sglang_prfaas.errors import ConfigError


def deployment_findings(sites: Mapping[str, SiteConfig], routers: Mapping[str, RouterConfig]) -> list[Finding]:
    """Check sites and routers together; the keys are the files they came from."""
    return [
        *_site_names(sites),
        *_links(sites),
        *_gateways(sites),
        *_cache_peers(sites),
        *_security(sites),
        *_router_sites(sites, routers),
        *_models(sites, routers),
        *_ports(sites, routers),
    ]


def _site_names(sites: Mapping[str, SiteConfig]) -> Iterator[Finding]:
    seen: dict[str, str] = {}
    for source, config in sites.items():
        name = config.site.name
        if name in seen:
            yield Finding(source, "site.name", f"{name!r} is also the name of {seen[name]}; give each site its own")
        seen.setdefault(name, source)


def _links(sites: Mapping[str, SiteConfig]) -> Iterator[Finding]:
    names = {config.site.name for config in sites.values()}
    if len(sites) < 2:
        return
    for source, config in sites.items():
        for link in config.links:
            if link.to_site not in names:
                text = f"none of the given files describes that site; they describe {', '.join(sorted(names))}"
                yield Finding(source, f"links.{link.to_site}.to_site", text, fatal=False)


def _gateways(sites: Mapping[str, SiteConfig]) -> Iterator[Finding]:
    """Whether both sites of a link agree on who dials, and on the ports to be had at the gateway."""
    by_name = {config.site.name: (source, config) for source, config in sites.items()}
    for source, config in sites.items():
        for link in config.links:
            there, other = by_name.get(link.to_site, ("", None))
            back = next((one for one in other.links if one.to_site == config.site.name), None) if other else None
            path = f"links.{link.to_site}"
            if other is None or link.dial == "decode":
                continue
            if back is None or back.dial != "prefill":
                text = f'{there} does not say so of its link to {config.site.name}; write dial = "prefill" there too'
                yield Finding(source, f"{path}.dial", text)
            elif bool(link.gateway_ports) == bool(back.gateway_ports):
                text = f"either this file or {there} needs it: that of the site which is dialled"
                yield Finding(source, f"{path}.gateway_ports", text)
            elif link.gateway_ports:
                yield from _gateway_ports(source, f"{path}.gateway_ports", link.gateway_ports, other)


def _gateway_ports(source: str, path: str, listed: list[int], other: SiteConfig) -> Iterator[Finding]:
    try:
        offered = offered_ports(other).keys()
    except ConfigError:
        return  # found in that file
    if missing := sorted(offered - set(listed)):
        text = f"lacks {', '.join(map(str, missing))} of site {other.site.name}; what listens there cannot be reached"
        yield Finding(source, path, text, fatal=False)
    if surplus := sorted(set(listed) - offered):
        yield Finding(source, path, f"site {other.site.name} offers no {', '.join(map(str, surplus))}; remove that")


def _cache_peers(sites: Mapping[str, SiteConfig]) -> Iterator[Finding]:
    """Whether a prefix cache that is asked is served, and to whom."""
    by_name = {config.site.name: config for config in sites.values()}
    for source, config in sites.items():
        for peer in config.prefix_cache.peers:
            path, other = f"prefix_cache.peers.{peer.name}", by_name.get(peer.name)
            if other is None:
                if len(sites) > 1:
                    yield Finding(source, f"{path}.name", "none of the given files describes that site", fatal=False)
                continue
            cache, transport = other.prefix_cache, other.transport
            if not cache.serve_port:
                yield Finding(source, f"{path}.port", "that site serves no prefix cache; write its serve_port there")
            elif cache.serve_port != peer.port:
                text = f"is {peer.port}, that site serves on {cache.serve_port}; right only behind a port forwarding"
                yield Finding(source, f"{path}.port", text, fatal=False)
            keys = transport.keys_dir and transport.security != "off"
            if keys and cache.serve_port and config.site.name not in cache.serve_to:
                text = f"that site does not serve this one; write {config.site.name!r} into its prefix_cache.serve_to"
                yield Finding(source, path, text)


def _security(sites: Mapping[str, SiteConfig]) -> Iterator[Finding]:
    """Ranks with keys and ranks without do not talk to each other."""

    def secured(transport: TransportConfig) -> bool:
        return bool(transport.keys_dir) and transport.security != "off"

    with_keys = [source for source, config in sites.items() if secured(config.transport)]
    for source in sites:
        if with_keys and source not in with_keys:
            text = f"no keys here, but in {', '.join(with_keys)}; give every site of a deployment its keys, or none"
            yield Finding(source, "transport.keys_dir", text)


def _router_sites(sites: Mapping[str, SiteConfig], routers: Mapping[str, RouterConfig]) -> Iterator[Finding]:
    by_name = {config.site.name: config for config in sites.values()}
    for source, router in routers.items():
        for entry in router.sites:
            path = f"sites.{entry.name}"
            site = by_name.get(entry.name)
            if site is None:
                if sites:
                    text = f"no such site in the given files; they describe {', '.join(sorted(by_name))}"
                    yield Finding(source, f"{path}.name", text)
                continue
            if entry.role != site.site.role:
                text = f'that site\'s file says role = "{site.site.role}"; write the same here'
                yield Finding(source, f"{path}.role", text)
            yield from _router_targets(source, path, entry, site)


def _router_targets(source: str, path: str, entry: RouterSite, site: SiteConfig) -> Iterator[Finding]:
    if entry.agent_url and not url_problem(entry.agent_url):
        port = urlsplit(entry.agent_url).port
        scheme = "https" if site.agent.tls else "http"
        if not site.agent.port:
            text = "that site's file starts no agent; write agent.port there, or list its servers here"
            yield Finding(source, f"{path}.agent_url", text)
        elif port != site.agent.port:
            text = f"leads to port {port}, the site's agent listens on {site.agent.port}; right only behind a proxy"
            yield Finding(source, f"{path}.agent_url", text, fatal=False)
        elif not entry.agent_url.startswith(f"{scheme}:"):
            text = f"that site says tls = {str(site.agent.tls).lower()}; write {scheme}://; else only behind a proxy"
            yield Finding(source, f"{path}.agent_url", text, fatal=site.agent.tls)
    if entry.reports_port and entry.reports_port != site.agent.reports_port:
        there = f"the site's file says {site.agent.reports_port}" if site.agent.reports_port else "the site has none"
        text = f"is {entry.reports_port}, {there} (agent.reports_port); right only behind a port forwarding"
        yield Finding(source, f"{path}.reports_port", text, fatal=False)
    servers = {server.name: server for server in site.servers}
    for target in entry.servers:
        server = servers.get(target.name)
        where = f"{path}.servers.{target.name}"
        if server is None:
            text = f"the site has no such server; it has {', '.join(servers)}"
            yield Finding(source, f"{where}.name", text)
            continue
        if target.role != server.role:
            yield Finding(source, f"{where}.role", f'the site\'s file says "{server.role}"; write the same here')
        if target.role == "prefill" and target.bootstrap_port != server.bootstrap_port:
            text = f"is {target.bootstrap_port}, the site's file says {server.bootstrap_port}; write the same here"
            yield Finding(source, f"{where}.bootstrap_port", text)


def _models(sites: Mapping[str, SiteConfig], routers: Mapping[str, RouterConfig]) -> Iterator[Finding]:
    """A deployment serves one model: paths may differ by site, the name clients use may not."""
    names: dict[str, str] = {}
    for source, site in sites.items():
        names[source] = site.site.served_model_name or site.site.model
    for source, router in routers.items():
        names[source] = router.router.served_model_name or router.router.model
    first = next(iter(names.items()), None)
    for source, name in names.items():
        if first is not None and name != first[1]:
            path = "router.served_model_name" if source in routers else "site.served_model_name"
            text = f"clients would use {name!r} here and {first[1]!r} in {first[0]}; write one name in both"
            yield Finding(source, path, text)


def _ports(sites: Mapping[str, SiteConfig], routers: Mapping[str, RouterConfig]) -> Iterator[Finding]:
    """Clashes between files. Those of one file are found by `checks.site_findings`."""
    claims = [claim for source, site in sites.items() for claim in ports.site_claims(site, source)]
    claims += [claim for source, router in routers.items() for claim in ports.router_claims(router, source)]
    for first, second in ports.clashes(claims):
        if first.source == second.source:
            continue
        text = f"{second.what} wants {second.ports}, which {first.what} of {first.source} has ({first.key})"
        if ports.certainly_one_host((first, second)):
            yield Finding(second.source, second.key, f"{text}; choose another port")
        else:
            yield Finding(second.source, second.key, f"{text}; choose another if both run on one machine", fatal=False)
