"""`launch check`: are these files right, on their own and together, and what would run."""

from __future__ import annotations

import argparse
import shlex
import sys

from sglang_prfaas.config import checks, load
from sglang_prfaas.config.checks import deployment_findings
from sglang_prfaas.config.ports import claims_for_others
from sglang_prfaas.config.prefix_cache import serve_host
from sglang_prfaas.config.schema import RouterConfig, SiteConfig
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.launch.key_check import key_findings, router_key_findings
from sglang_prfaas.launch.overrides import describe_keys, print_warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch check`."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="TOML files of sites and routers")
    parser.add_argument("--quiet", action="store_true", help="print problems and warnings only")
    parser.description = (
        "Check configuration files, each on its own and all together, and print what would run: the command line and\n"
        "environment of every server, and the targets of every router. Flags for keys need exactly one FILE."
    )
    describe_keys(parser, SiteConfig, RouterConfig)


def run(args: argparse.Namespace) -> int:
    """Check; returns 0. Raises ConfigError with every problem of every file."""
    if args.overrides and len(args.files) > 1:
        raise ConfigError("flags for configuration keys apply to one file; give one FILE, or none of them")
    sites: dict[str, SiteConfig] = {}
    routers: dict[str, RouterConfig] = {}
    problems: list[str] = []
    findings: list[checks.Finding] = []
    for file in dict.fromkeys(args.files):
        try:
            if load.kind_of(file) == "site":
                sites[file] = load.load_site(file, args.overrides, check=False)
                findings += checks.site_findings(sites[file], file)
            else:
                routers[file] = load.load_router(file, args.overrides, check=False)
                findings += checks.router_findings(routers[file], file)
                findings += profile_findings(routers[file], file)
        except ConfigError as error:
            problems += error.problems
    findings += deployment_findings(sites, routers)
    findings += key_findings(sites) + router_key_findings(routers)
    problems += checks.fatal(findings)
    print_warnings(findings)
    if problems:
        raise ConfigError(problems)
    if not args.quiet:
        for file, site in sites.items():
            print("\n".join(describe_site(file, site)), end="\n\n")
        for file, router in routers.items():
            print("\n".join(describe_router(file, router)), end="\n\n")
    print(f"{len(sites) + len(routers)} of {len(set(args.files))} files are right", file=sys.stderr)
    return 0


def profile_findings(config: RouterConfig, source: str) -> list[checks.Finding]:
    """Whether the profile of a live policy can be read, and has a curve for every site."""
    if not config.policy.is_live or not config.policy.profile:
        return []
    from sglang_prfaas.router.profile import router_profile

    try:
        router_profile(config)
    except ConfigError as error:
        return [checks.Finding(source, "policy.profile", problem) for problem in error.problems]
    return []


def describe_site(file: str, config: SiteConfig) -> list[str]:
    """What `launch site` would run."""
    from sglang_prfaas.site.commands import site_commands

    site = config.site
    lines = [f"{file}: site {site.name} ({site.role}), model {site.model}"]
    for command in site_commands(config):
        where = authority(command.host, command.port)
        if command.bootstrap_port:
            where += f", bootstrap {command.bootstrap_port}"
        lines.append(f"  server {command.name} ({command.role}) on {where}")
        lines.append("    env \\")
        lines += [f"      {name}={shlex.quote(value)} \\" for name, value in command.env.items()]
        lines.append(f"    {shlex.join(command.argv)}")
        if command.needs_nccl_port:
            lines.append("    # and --nccl-port with a free port, chosen at the start")
    if config.agent.port:
        lines.append(
            f"  agent on {authority(config.agent.host, config.agent.port)}, relays to {len(config.servers)} servers"
        )
    claims = claims_for_others(config)
    if ports := _ranges(sorted({port for claim in claims for port in range(claim.first, claim.last + 1)})):
        lines.append(f"  for other sites: TCP {ports}; SGLang's own ports stay inside")
    cache = config.prefix_cache
    if cache.serve_port:
        to = ", ".join(cache.serve_to) or "no other site with keys"
        lines.append(f"  prefix cache served on {authority(serve_host(config), cache.serve_port)} to {to}")
    for peer in cache.peers:
        lines.append(f"  prefixes of site {peer.name} from {authority(peer.host, peer.port)}")
    for link in config.links:
        lines.append(f"  link to {link.to_site}: {link.capacity_gbps:g} Gbit/s, {link.rtt_ms:g} ms")
    return lines


def describe_router(file: str, config: RouterConfig) -> list[str]:
    """What `launch router` would serve."""
    router = config.router
    lines = [
        f"{file}: router on {authority(router.host, router.port)}, model {router.served_model_name or router.model}, "
        f"{'live threshold from' if config.policy.is_live else 'threshold'} {config.policy.threshold_tokens} tokens"
    ]
    for site in config.sites:
        how = f"servers listed by its agent {site.agent_url}" if site.agent_url else f"{len(site.servers)} servers"
        lines.append(f"  site {site.name} ({site.role}): {how}")
        for server in site.servers:
            bootstrap = (
                f", bootstrap {authority(server.bootstrap_host, server.bootstrap_port)}"
                if server.bootstrap_port
                else ""
            )
            lines.append(f"    {server.name} ({server.role}) {server.url}{bootstrap}")
    return lines


def _ranges(ports: list[int]) -> str:
    """`8998, 31000-31007` for a sorted list."""
    groups: list[list[int]] = []
    for port in ports:
        if groups and groups[-1][-1] == port - 1:
            groups[-1].append(port)
        else:
            groups.append([port])
    return ", ".join(str(group[0]) if len(group) == 1 else f"{group[0]}-{group[-1]}" for group in groups)
