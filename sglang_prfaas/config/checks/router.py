"""Rules of a router's file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from urllib.parse import urlsplit

from sglang_prfaas.config.addresses import router_addresses, url_problem
from sglang_prfaas.config.checks.finding import (
    NOT_EXPANDED,
    Exists,
    Finding,
    Raw,
    findings_of,
    model_findings,
    repeated,
)
from sglang_prfaas.config.checks.policy import policy_findings, role_findings
from sglang_prfaas.config.checks.tenancy import kv_event_findings, tenancy_findings
from sglang_prfaas.config.schema import RouterConfig, RouterSite
from sglang_prfaas.config.security import beyond_this_machine


def router_findings(config: RouterConfig, source: str = "", exists: Exists = os.path.exists) -> list[Finding]:
    """Check one router. exists: whether a path exists, for the model."""
    return findings_of(
        source,
        (
            *router_addresses(config),
            *_sites(config),
            *model_findings("router.model", config.router.model, exists),
            *policy_findings(config, exists),
            *_links(config),
            *tenancy_findings(config),
            *kv_event_findings(config),
            *_codecs(config),
            *role_findings(config),
        ),
    )


def _sites(config: RouterConfig) -> Iterator[Raw]:
    for name, count in repeated(site.name for site in config.sites):
        yield "sites", f"{count} sites are named {name!r}; give each a name of its own", True
    roles = [site.role for site in config.sites]
    if "pd" not in roles:
        yield "sites", 'no site decodes; add [[sites]] with role = "pd"', True
    if "prfaas" not in roles:
        yield "sites", 'no site with role = "prfaas": every prompt is prefilled locally, whatever the threshold', False
    for site in config.sites:
        yield from _site(site)
    yield from _reports(config)


def _site(site: RouterSite) -> Iterator[Raw]:
    path = f"sites.{site.name}"
    if site.agent_url and site.servers:
        yield path, "has agent_url and servers; keep agent_url (the agent lists the servers), or else the servers", True
    if not site.agent_url and not site.servers:
        text = 'has neither agent_url nor servers; write agent_url = "http://HOST:PORT", or add [[sites.servers]]'
        yield path, text, True
    for name, count in repeated(server.name for server in site.servers):
        yield f"{path}.servers", f"{count} servers are named {name!r}; give each a name of its own", True
    for server in site.servers:
        if site.role == "prfaas" and server.role == "decode":
            text = 'a prfaas site has no decode servers; write role = "prefill" or move it to a pd site'
            yield f"{path}.servers.{server.name}.role", text, True
        if server.role == "prefill" and not server.bootstrap_port:
            text = "a prefill server needs one; write the bootstrap_port of its site's file"
            yield f"{path}.servers.{server.name}.bootstrap_port", text, True
    if site.role == "pd" and site.servers and not any(server.role == "decode" for server in site.servers):
        yield f"{path}.servers", 'a pd site needs a decode server; add one with role = "decode"', True


def _reports(config: RouterConfig) -> Iterator[Raw]:
    reports = config.reports
    if reports.security == "keys" and not reports.keys_dir:
        yield "reports.security", 'needs keys; write for example keys_dir = "/etc/sglang-prfaas/keys"', True
    if reports.keys_dir.startswith("~"):
        yield "reports.keys_dir", NOT_EXPANDED, True
    for site in config.sites:
        path = f"sites.{site.name}.reports_port"
        if site.reports_port and not site.agent_url:
            yield path, "is a port of the site's agent; write agent_url too, or remove it", True
        host = urlsplit(site.agent_url).hostname or "" if not url_problem(site.agent_url) else "localhost"
        if site.reports_port and beyond_this_machine(host) and not reports.keys_dir and reports.security != "off":
            text = f"the agent at {host} is beyond this machine, and there are no keys; set reports.keys_dir"
            yield path, text, True


def _links(config: RouterConfig) -> Iterator[Raw]:
    """Live routing has to know every link between a PrfaaS and a PD site."""
    pd = [site.name for site in config.sites if site.role == "pd"]
    for site in config.sites:
        path = f"sites.{site.name}.links"
        if site.role == "pd" and site.links:
            yield path, "links are those of prfaas sites, which send; write it there", True
            continue
        to = [link.to_site for link in site.links]
        for name in dict.fromkeys(to):
            if to.count(name) > 1:
                yield path, f"{to.count(name)} links lead to site {name!r}; keep one", True
            if name not in pd:
                yield path, f"leads to {name!r}, which is no pd site of this router; it has {', '.join(pd)}", True
        for name in pd if site.role == "prfaas" and config.policy.is_live else ():
            if name not in to:
                text = f"live routing has to know the link to {name}; add [[sites.links]] with "
                yield path, text + f'to_site = "{name}" and capacity_gbps', True


def _codecs(config: RouterConfig) -> Iterator[Raw]:
    of_movers = ("codec", "connections", "socket_buffer_bytes", "congestion_control", "pacing_mbps")
    for site in config.sites:
        for link in site.links:
            for key in filter(partial(getattr, link), of_movers):
                path = f"sites.{site.name}.links.{link.to_site}.{key}"
                yield path, "a router moves no KVCache; write it in [[links]] of that site's own file", True
