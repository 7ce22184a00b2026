"""Links that the prefilling site dials: what their keys mean, and which ports are reached through a gateway."""

from __future__ import annotations

from sglang_prfaas.config import ports
from sglang_prfaas.config.schema import LinkConfig, SiteConfig
from sglang_prfaas.errors import ConfigError


def gateway_address(link: LinkConfig) -> tuple[str, int]:
    """Host and port of a link's gateway. Raises ConfigError."""
    host, colon, port = link.gateway.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65534:
        raise ConfigError(f"links.{link.to_site}.gateway: expected HOST:PORT, got {link.gateway!r}")
    return host.strip("[]"), int(port)


def offered_ports(config: SiteConfig) -> dict[int, str]:
    """Host by port, of what other sites may reach at a site: bootstraps, movers, the agent, the prefix cache; not
    SGLang itself. Raises ConfigError for a port that two hosts have: behind one gateway they cannot be told apart."""
    found: dict[int, str] = {}
    for claim in ports.claims_for_others(config):
        host = "127.0.0.1" if claim.host in ("", "0.0.0.0", "::") else claim.host
        for port in range(claim.first, claim.last + 1):
            if found.setdefault(port, host) != host:
                raise ConfigError(
                    f"{claim.key}: port {port} is used on {found[port]} and {host}; behind a gateway each needs its own"
                )
    return found
