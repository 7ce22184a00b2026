"""`launch gateway`: one end of the links that the prefilling site dials, until it is told to stop."""

from __future__ import annotations

import argparse
import signal
import threading

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config import load
from sglang_prfaas.config.gateway import gateway_address, offered_ports
from sglang_prfaas.config.schema import LinkConfig, SiteConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.launch.overrides import log_to_stderr
from sglang_prfaas.transport.dial_out import DialOut
from sglang_prfaas.transport.gateway import Gateway


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch gateway`."""
    parser.add_argument("file", metavar="FILE", help="TOML file of the site")
    parser.description = (
        'Serve the [[links]] of a site that have dial = "prefill": with gateway_ports, listen for the other site and\n'
        "for those who want to reach it; without, dial the other site's gateway. SIGTERM or SIGINT stop it."
    )


def run(args: argparse.Namespace) -> int:
    """Serve; returns the exit status."""
    config = load.load_site(args.file)
    log_to_stderr()
    links = [link for link in config.links if link.dial == "prefill"]
    if not links:
        raise ConfigError(f'{args.file}: no [[links]] with dial = "prefill"; a gateway has nothing to do')
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    ends: list[Gateway | DialOut] = []
    try:
        for link in links:
            end = made(config, link)
            ends.append(end)
            end.start()
        print(f"gateway is ready: {', '.join(link.to_site for link in links)}", flush=True)
        stopped.wait()
    finally:
        for end in ends:
            end.stop()
    return 0


def made(config: SiteConfig, link: LinkConfig) -> Gateway | DialOut:
    """This site's end of a link. Raises ConfigError, LocalError."""
    host, port = gateway_address(link)
    clock = MonotonicClock()
    if link.gateway_ports:
        return Gateway(host, port, link.gateway_ports, link.to_site, config.transport, clock)
    return DialOut(
        host,
        port,
        offered_ports(config),
        site=config.site.name,
        to_site=link.to_site,
        config=config.transport,
        clock=clock,
    )
