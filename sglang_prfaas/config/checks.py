"""Rules that span fields: what a single type cannot say. Each finding says what to write instead."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from urllib.parse import urlsplit

from msgspec import Struct

from sglang_prfaas import env
from sglang_prfaas.config import ports, sglang_args
from sglang_prfaas.config.addresses import router_addresses, site_addresses, url_problem
from sglang_prfaas.config.gateway import gateway_findings
from sglang_prfaas.config.inner_rail import inner_rail_findings
from sglang_prfaas.config.prefix_cache import prefix_cache_findings
from sglang_prfaas.config.schema import (
    PolicyConfig,
    RouterConfig,
    RouterSite,
    ServerConfig,
    SiteConfig,
    TransportConfig,
)
from sglang_prfaas.config.security import NO_KEYS, beyond_this_machine
from sglang_prfaas.config.tenancy import kv_event_findings, tenancy_findings

Exists = Callable[[str], bool]


class Finding(Struct, frozen=True):
    """One result of a check.

    source: the file, empty where there is none. path: dotted path of the key. fatal: False for a warning.
    """

    source: str
    path: str
    text: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.source}: {self.path}: {self.text}" if self.source else f"{self.path}: {self.text}"


def site_findings(config: SiteConfig, source: str = "", exists: Exists = os.path.exists) -> list[Finding]:
    """Check one site. exists: whether a path exists, for the model."""
    return [
        Finding(source, path, text, fatal)
        for path, text, fatal in (
            *_names(config),
            *site_addresses(config),
            *_roles(config),
            *_server_ports(config),
            *_links(config),
            *_arguments(config),
            *_environment(config),
            *_security(config),
            *_reports(config),
            *prefix_cache_findings(config),
            *inner_rail_findings(config),
            *_model("site.model", config.site.model, exists),
            *_port_clashes(config),
        )
    ]


def router_findings(config: RouterConfig, source: str = "", exists: Exists = os.path.exists) -> list[Finding]:
    """Check one router. exists: whether a path exists, for the model."""
    found = [
        *router_addresses(config),
        *_router_sites(config),
        *_model("router.model", config.router.model, exists),
        *_policy(config, exists),
        *_router_links(config),
        *tenancy_findings(config),
        *kv_event_findings(config),
        *_router_codecs(config),
        *_role_changes(config),
    ]
    return [Finding(source, path, text, fatal) for path, text, fatal in found]


_Raw = tuple[str, str, bool]


def _role_changes(config: RouterConfig) -> Iterator[_Raw]:
    roles = config.policy.roles
    if roles.horizon_s <= roles.cost_s:
        yield (
            "policy.roles.horizon_s",
            f"{roles.horizon_s:g} s is not longer than a switch takes (drain_s + switch_s = {roles.cost_s:g} s), so "
            "none could pay; write a longer horizon",
            True,
        )
    if 0 < roles.slot_period_s <= 2 * roles.cost_s:
        yield (
            "policy.roles.slot_period_s",
            f"{roles.slot_period_s:g} s is not longer than its two switches ({2 * roles.cost_s:g} s); write a longer "
            "period, or 0 for no slots",
            True,
        )
    if roles.enabled and not any(site.role == "pd" and site.agent_url and site.reports_port for site in config.sites):
        yield (
            "policy.roles.enabled",
            "no pd site has an agent that takes commands; write its agent_url and reports_port, or enabled = false",
            True,
        )
    if roles.slo_tokens_per_s and not config.policy.is_live:
        yield "policy.roles.slo_tokens_per_s", "has no effect without policy.profile; write one, or remove it", False


def _names(config: SiteConfig) -> Iterator[_Raw]:
    for name, count in Counter(server.name for server in config.servers).items():
        if count > 1:
            yield "servers", f"{count} servers are named {name!r}; give each a name of its own", True
    for name, count in Counter(link.to_site for link in config.links).items():
        if count > 1:
            yield "links", f"{count} links lead to site {name!r}; keep one [[links]] per site", True


def _roles(config: SiteConfig) -> Iterator[_Raw]:
    roles = {server.role for server in config.servers}
    if config.site.role == "prfaas":
        for server in config.servers:
            if server.role == "decode":
                yield (
                    f"servers.{server.name}.role",
                    'a prfaas site has no decode servers; write role = "prefill", or move the server to a pd site',
                    True,
                )
        return
    if "decode" not in roles:
        yield (
            "servers",
            'a pd site needs a decode server; add [[servers]] with role = "decode", '
            'or write site.role = "prfaas" for a site that only prefills',
            True,
        )
    if "prefill" not in roles:
        if config.links:
            text = "no prefill server: every prompt, short or long, is prefilled in another site and crosses the link"
            yield "servers", text, False
        else:
            yield (
                "servers",
                'nothing prefills for this pd site; add [[servers]] with role = "prefill", '
                "or a [[links]] to the prfaas site that is to prefill every prompt",
                True,
            )


def _server_ports(config: SiteConfig) -> Iterator[_Raw]:
    for server in config.servers:
        args = [*config.site.args, *server.args]
        path = f"servers.{server.name}"
        switches = sglang_args.switches_roles(args)
        if server.role == "prefill" and not server.bootstrap_port:
            yield f"{path}.bootstrap_port", "a prefill server needs one; write for example bootstrap_port = 8998", True
        if server.role == "decode" and switches and not server.bootstrap_port:
            text = "--enable-pd-role-switch starts a bootstrap here too; write for example bootstrap_port = 8999"
            yield f"{path}.bootstrap_port", text, True
        for key in ("bootstrap_port", "mover_port"):
            if server.role == "decode" and not switches and getattr(server, key):
                text = "not used by a decode server without --enable-pd-role-switch; remove it"
                yield f"{path}.{key}", text, False
        last = server.mover_port + 2 * sglang_args.rank_count(args) - 1
        if server.mover_port and last > 65535:
            text = f"the last rank would listen on {last}; write at most {server.mover_port - (last - 65535)}"
            yield f"{path}.mover_port", text, True


def _links(config: SiteConfig) -> Iterator[_Raw]:
    for link in config.links:
        if link.to_site == config.site.name:
            yield f"links.{link.to_site}.to_site", "this is the site itself; write the name of the other site", True
        yield from gateway_findings(config, link)


def _arguments(config: SiteConfig) -> Iterator[_Raw]:
    yield from _owned("site.args", config.site.args, None)
    for server in config.servers:
        yield from _owned(f"servers.{server.name}.args", server.args, server)


def _owned(path: str, args: Sequence[str], server: ServerConfig | None) -> Iterator[_Raw]:
    for option, key in sglang_args.OWNED.items():
        if sglang_args.has(args, option):
            target = key.replace("*", server.name) if server is not None else key.replace("*", "<name>")
            yield path, f"{option} is set by the key {target}; write it there and remove it here", True
    for arg in args:
        if not arg.startswith("-") and any(char.isspace() for char in arg) and arg.lstrip("'\"").startswith("--"):
            yield path, f"{arg!r} holds several words; write each word as a string of its own", True
    for arg in args:
        if arg.startswith("--") and any(char.isspace() for char in arg.partition("=")[0]):
            option, _, rest = arg.partition(" ")
            yield path, f'{arg!r} holds several words; write "{option}", "{rest.strip()}"', True


def _environment(config: SiteConfig) -> Iterator[_Raw]:
    owned = {name: f"transport.{name[len(env.PREFIX) :].lower()}" for name in env.transport_to_env(TransportConfig())}
    owned |= {
        env.LINKS: "links",
        env.LINK_CODECS: "links.*.codec",
        env.SITE: "site.name",
        env.SERVER: "servers.*.name",
        env.MOVER_PORT: "servers.*.mover_port",
    }
    tables = [("site.env", config.site.env)]
    tables += [(f"servers.{server.name}.env", server.env) for server in config.servers]
    for path, table in tables:
        for name in table:
            if name in owned:
                yield f"{path}.{name}", f"is set by the key {owned[name]}; write it there and remove it here", True


def _security(config: SiteConfig) -> Iterator[_Raw]:
    transport = config.transport
    if config.site.transfer_backend != "prfaas":
        return
    if transport.security == "keys" and not transport.keys_dir:
        yield "transport.security", 'needs keys; write for example keys_dir = "/etc/sglang-prfaas/keys"', True
    if transport.keys_dir.startswith("~"):
        yield "transport.keys_dir", "starts with '~', which is not expanded; write the whole path", True
    if transport.security == "off" and transport.keys_dir:
        yield "transport.security", '"off": the keys in keys_dir are not used', False
    if transport.security != "off" and transport.keys_dir:
        return
    for server in config.servers:
        listens = server.role == "prefill" or server.bootstrap_port
        hosts = (server.host, transport.bind_host or server.host) if listens else ()
        host = next(filter(beyond_this_machine, hosts), None)
        if host is None:
            continue
        what = f"the KVCache of server {server.name} is served on {host or 'every address'}"
        if transport.security == "off":
            text = f'"off", and {what}: whoever reaches it can read and forge KVCache'
            yield "transport.security", text, False
        else:
            yield "transport.keys_dir", f"{what}, {NO_KEYS}", True
        return


def _reports(config: SiteConfig) -> Iterator[_Raw]:
    agent, transport = config.agent, config.transport
    if agent.tls and not transport.keys_dir:
        yield "agent.tls", "needs keys; write transport.keys_dir, this site's directory as `launch keys` makes it", True
    if agent.tls and transport.security == "off":
        yield "agent.tls", 'needs keys, and transport.security is "off"; remove one of the two', True
    if agent.port and not agent.tls and transport.keys_dir and beyond_this_machine(agent.host):
        text = "prompts and answers cross in clear; write true, unless the network or a proxy protects them"
        yield "agent.tls", text, False
    if agent.reports_port and not agent.port:
        yield "agent.port", "routers with reports need the agent's HTTP port too; write for example port = 9000", True
    if not agent.reports_port or not beyond_this_machine(agent.host):
        return
    what = f"reports are sent to, and commands taken from, whoever reaches {agent.host or 'any address'}"
    if transport.security == "off":
        yield "agent.reports_port", f'transport.security is "off": {what}', False
    elif not transport.keys_dir:
        text = f"{what}, without keys: set transport.keys_dir, or reports_port = 0"
        yield "agent.reports_port", text, True


def _model(path: str, model: str, exists: Exists) -> Iterator[_Raw]:
    if model.startswith("~"):
        yield path, f"{model!r} starts with '~', which is not expanded; write the whole path", True
    elif (os.path.isabs(model) or model.startswith(("./", "../")) or model.count("/") > 1) and not exists(model):
        text = (
            f"no such directory: {model!r}; write the path of the model, or owner/name of one on the Hugging Face hub"
        )
        yield path, text, True


def _port_clashes(config: SiteConfig) -> Iterator[_Raw]:
    for first, second in ports.clashes(ports.site_claims(config)):
        yield second.key, _clash_text(first, second), True


def _clash_text(first: ports.PortClaim, second: ports.PortClaim) -> str:
    where = f" ({first.source})" if first.source and first.source != second.source else ""
    return f"{second.what} wants {second.ports}, which {first.what}{where} has ({first.key}); choose another port"


def _router_sites(config: RouterConfig) -> Iterator[_Raw]:
    for name, count in Counter(site.name for site in config.sites).items():
        if count > 1:
            yield "sites", f"{count} sites are named {name!r}; give each a name of its own", True
    roles = [site.role for site in config.sites]
    if "pd" not in roles:
        yield "sites", 'no site decodes; add [[sites]] with role = "pd"', True
    if "prfaas" not in roles:
        yield "sites", 'no site with role = "prfaas": every prompt is prefilled locally, whatever the threshold', False
    for site in config.sites:
        yield from _router_site(site)
    yield from _router_reports(config)


def _router_reports(config: RouterConfig) -> Iterator[_Raw]:
    reports = config.reports
    if reports.security == "keys" and not reports.keys_dir:
        yield "reports.security", 'needs keys; write for example keys_dir = "/etc/sglang-prfaas/keys"', True
    if reports.keys_dir.startswith("~"):
        yield "reports.keys_dir", "starts with '~', which is not expanded; write the whole path", True
    for site in config.sites:
        path = f"sites.{site.name}.reports_port"
        if site.reports_port and not site.agent_url:
            yield path, "is a port of the site's agent; write agent_url too, or remove it", True
        host = urlsplit(site.agent_url).hostname or "" if not url_problem(site.agent_url) else "localhost"
        if site.reports_port and beyond_this_machine(host) and not reports.keys_dir and reports.security != "off":
            text = f"the agent at {host} is beyond this machine, and there are no keys; set reports.keys_dir"
            yield path, text, True


def _router_codecs(config: RouterConfig) -> Iterator[_Raw]:
    of_movers = ("codec", "connections", "socket_buffer_bytes", "congestion_control", "pacing_mbps")
    for site in config.sites:
        for link in site.links:
            for key in filter(partial(getattr, link), of_movers):
                path = f"sites.{site.name}.links.{link.to_site}.{key}"
                yield path, "a router moves no KVCache; write it in [[links]] of that site's own file", True


def _policy(config: RouterConfig, exists: Exists) -> Iterator[_Raw]:
    policy = config.policy
    if policy.mode == "live" and not policy.profile:
        text = (
            '"live" needs measured curves; write policy.profile = "FILE" (docs/planning.md has the format), or "paper"'
        )
        yield "policy.mode", text, True
    if policy.mode == "fixed" and policy.profile:
        yield "policy.profile", 'not used with mode = "fixed"; remove it, or write mode = "live"', False
    if policy.profile.startswith("~"):
        yield "policy.profile", "starts with '~', which is not expanded; write the whole path", True
    elif policy.profile not in ("", "paper") and not exists(policy.profile):
        yield "policy.profile", f'no such file: {policy.profile!r}; write the path of a profile file, or "paper"', True
    yield from _order(config)
    if policy.is_live:
        return
    defaults = PolicyConfig()
    for key in ("slo_ttft_s", "max_wait_s", "max_kv_occupancy"):
        if getattr(policy, key) != getattr(defaults, key):
            text = "has no effect with a fixed threshold; write a profile, or remove it"
            yield f"policy.{key}", text, False


def _order(config: RouterConfig) -> Iterator[_Raw]:
    policy, limit_s = config.policy, config.limits.first_byte_timeout_s
    if policy.order == "ordered" and not policy.is_live:
        text = '"ordered" needs measured curves; write policy.profile = "FILE" (docs/planning.md has the format)'
        yield "policy.order", text, True
    if policy.is_ordered and policy.max_held_s >= limit_s:
        text = (
            f"requests may wait longer in the router ({policy.max_held_s:g} s) than at servers "
            f"(limits.first_byte_timeout_s = {limit_s:g}); write less, or more there"
        )
        yield "policy.max_held_s", text, False


def _router_links(config: RouterConfig) -> Iterator[_Raw]:
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


def _router_site(site: RouterSite) -> Iterator[_Raw]:
    path = f"sites.{site.name}"
    if site.agent_url and site.servers:
        yield path, "has agent_url and servers; keep agent_url (the agent lists the servers), or else the servers", True
    if not site.agent_url and not site.servers:
        text = 'has neither agent_url nor servers; write agent_url = "http://HOST:PORT", or add [[sites.servers]]'
        yield path, text, True
    for name, count in Counter(server.name for server in site.servers).items():
        if count > 1:
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


def fatal(findings: Iterable[Finding]) -> list[str]:
    """The messages of those findings that refuse a configuration."""
    return [str(finding) for finding in findings if finding.fatal]
