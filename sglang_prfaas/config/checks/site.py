"""Rules of a site's file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from sglang_prfaas import env
from sglang_prfaas.config import ports, sglang_args
from sglang_prfaas.config.addresses import site_addresses
from sglang_prfaas.config.checks.exposure import agent_findings, security_findings
from sglang_prfaas.config.checks.finding import Exists, Finding, Raw, findings_of, model_findings, repeated
from sglang_prfaas.config.checks.gateway import gateway_findings
from sglang_prfaas.config.checks.inner_rail import inner_rail_findings
from sglang_prfaas.config.checks.prefix_cache import prefix_cache_findings
from sglang_prfaas.config.schema import ServerConfig, SiteConfig, TransportConfig


def site_findings(config: SiteConfig, source: str = "", exists: Exists = os.path.exists) -> list[Finding]:
    """Check one site. exists: whether a path exists, for the model."""
    return findings_of(
        source,
        (
            *_names(config),
            *site_addresses(config),
            *_roles(config),
            *_server_ports(config),
            *_links(config),
            *_arguments(config),
            *_environment(config),
            *security_findings(config),
            *agent_findings(config),
            *prefix_cache_findings(config),
            *inner_rail_findings(config),
            *model_findings("site.model", config.site.model, exists),
            *_port_clashes(config),
        ),
    )


def _names(config: SiteConfig) -> Iterator[Raw]:
    for name, count in repeated(server.name for server in config.servers):
        yield "servers", f"{count} servers are named {name!r}; give each a name of its own", True
    for name, count in repeated(link.to_site for link in config.links):
        yield "links", f"{count} links lead to site {name!r}; keep one [[links]] per site", True


def _roles(config: SiteConfig) -> Iterator[Raw]:
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


def _server_ports(config: SiteConfig) -> Iterator[Raw]:
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


def _links(config: SiteConfig) -> Iterator[Raw]:
    for link in config.links:
        if link.to_site == config.site.name:
            yield f"links.{link.to_site}.to_site", "this is the site itself; write the name of the other site", True
        yield from gateway_findings(config, link)


def _arguments(config: SiteConfig) -> Iterator[Raw]:
    yield from _owned("site.args", config.site.args, None)
    for server in config.servers:
        yield from _owned(f"servers.{server.name}.args", server.args, server)


def _owned(path: str, args: Sequence[str], server: ServerConfig | None) -> Iterator[Raw]:
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


def _environment(config: SiteConfig) -> Iterator[Raw]:
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


def _port_clashes(config: SiteConfig) -> Iterator[Raw]:
    for first, second in ports.clashes(ports.site_claims(config)):
        yield second.key, _clash_text(first, second), True


def _clash_text(first: ports.PortClaim, second: ports.PortClaim) -> str:
    where = f" ({first.source})" if first.source and first.source != second.source else ""
    return f"{second.what} wants {second.ports}, which {first.what}{where} has ({first.key}); choose another port"
