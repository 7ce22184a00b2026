"""Links that the prefilling site dials: what their keys mean, and which ports are reached through a gateway."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_prfaas.config import ports
from sglang_prfaas.config.schema import LinkConfig, SiteConfig
from sglang_prfaas.config.security import beyond_this_machine
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


def gateway_findings(config: SiteConfig, link: LinkConfig) -> Iterator[tuple[str, str, bool]]:
    """Path, text and whether it is fatal, of what does not fit."""
    path = f"links.{link.to_site}"
    if link.dial == "decode":
        for key in ("gateway", "gateway_ports"):
            if getattr(link, key):
                yield f"{path}.{key}", 'has no effect without dial = "prefill"; write that, or remove it', False
        return
    if not link.gateway:
        yield f"{path}.gateway", 'dial = "prefill" needs one; write for example gateway = "10.2.0.9:7000"', True
        return
    try:
        host, port = gateway_address(link)
        offered = offered_ports(config) if not link.gateway_ports else {}
    except ConfigError as error:
        yield f"{path}.gateway", str(error), True
        return
    transport = config.transport
    if link.gateway_ports:
        clash = {port, port + 1} & set(link.gateway_ports)
        if clash:
            yield f"{path}.gateway_ports", f"{sorted(clash)[0]} is a port of the gateway itself; choose another", True
        if beyond_this_machine(host) and not transport.keys_dir and transport.security != "off":
            yield f"{path}.gateway", f"listens on {host} without keys; set transport.keys_dir", True
        return
    missing = [server.name for server in config.servers if server.role == "prefill" and not server.mover_port]
    if missing:
        text = f"server {missing[0]} has any free mover ports; write its mover_port, the same as in gateway_ports there"
        yield f"{path}.dial", text, True
    elif not offered:
        yield f"{path}.dial", "no server or agent here has a port to be reached at", True
    if not transport.advertise_host:
        text = f'decode ranks are sent to this host otherwise; write advertise_host = "{host}", the gateway\'s'
        yield "transport.advertise_host", text, False
