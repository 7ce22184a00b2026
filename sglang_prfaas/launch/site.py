"""`launch site`: one datacenter, until it is told to stop."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from typing import TYPE_CHECKING

import msgspec

from sglang_prfaas.config import checks, load
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.launch.key_check import key_findings
from sglang_prfaas.launch.overrides import describe_keys, log_to_stderr, print_warnings, say

if TYPE_CHECKING:
    from sglang_prfaas.site import Site

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch site`."""
    parser.add_argument("file", nargs="?", metavar="FILE", help="TOML file of the site")
    parser.add_argument(
        "--json-status", action="store_true", help="when all servers are ready, print one JSON line on stdout"
    )
    parser.add_argument(
        "--python", metavar="EXE", default=sys.executable, help="interpreter that has SGLang (default: this one)"
    )
    parser.description = (
        "Start one datacenter's servers and its agent, wait until all are ready, restart what dies.\n"
        "SIGTERM, SIGINT or SIGHUP stop it in order: prefill servers drain and end, then decode servers;\n"
        "a second one kills everything at once. Progress goes to stderr, the servers' output to their logs."
    )
    describe_keys(parser, SiteConfig)


def run(args: argparse.Namespace) -> int:
    """Run the site; returns the exit status."""
    config = load.load_site(args.file, args.overrides)
    log_to_stderr()
    source = load.name_of(args.file)
    keys = key_findings({source: config}, here=True)
    print_warnings([*checks.site_findings(config, source), *keys])
    if checks.fatal(keys):
        raise ConfigError(checks.fatal(keys))
    from sglang_prfaas.site import Site

    return asyncio.run(_serve(Site(config, python=args.python), json_status=args.json_status))


async def _serve(site: Site, *, json_status: bool) -> int:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)

    start = asyncio.create_task(site.start())
    if not await _first(start, stop):
        _say(site, "stopping before it was ready")
        start.cancel()
        await asyncio.wait([start])
        return 0
    await start
    _announce(site, json_status)
    all_failed = asyncio.create_task(site.supervisor.all_failed())
    given_up = await _first(all_failed, stop)
    all_failed.cancel()
    _say(site, "all servers were given up" if given_up else "stopping; a second signal kills at once")
    orderly = asyncio.create_task(site.stop())
    if not await _first(orderly, hurry):
        orderly.cancel()
        await asyncio.wait([orderly])
        await site.stop(at_once=True)
    elif error := orderly.exception():
        raise error
    return 1 if given_up else 0


async def _first(task: asyncio.Task[None], event: asyncio.Event) -> bool:
    """Wait for a task or an event; whether the task was first."""
    waiter = asyncio.create_task(event.wait())
    await asyncio.wait([task, waiter], return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
    return task.done()


def _announce(site: Site, json_status: bool) -> None:
    """The ready line on stdout."""
    if json_status:
        status = {
            "event": "ready",
            "site": site.name,
            "role": site.config.site.role,
            "agent_url": site.agent_url,
            "servers": [
                {
                    "name": server.name,
                    "role": server.command.role,
                    "url": server.url,
                    "pid": server.pid,
                    "bootstrap_port": server.command.bootstrap_port,
                    "log": str(server.log),
                }
                for server in site.servers.values()
            ],
        }
        print(msgspec.json.encode(status).decode(), flush=True)
        return
    parts = [f"{server.name} {server.url}" for server in site.servers.values()]
    if site.agent_url:
        parts.append(f"agent {site.agent_url}")
    print(f"site {site.name} is ready: {', '.join(parts)}", flush=True)


def _say(site: Site, text: str) -> None:
    say(f"[{site.name}] {text}")
