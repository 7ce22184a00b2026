"""Rules of links that the prefilling site dials."""

from __future__ import annotations

from collections.abc import Iterator

from sglang_prfaas.config.checks.finding import Raw
from sglang_prfaas.config.gateway import gateway_address, offered_ports
from sglang_prfaas.config.schema import LinkConfig, SiteConfig
from sglang_prfaas.config.security import beyond_this_machine
from sglang_prfaas.errors import ConfigError


def gateway_findings(config: SiteConfig, link: LinkConfig) -> Iterator[Raw]:
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
