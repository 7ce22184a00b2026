"""`launch control`: drain a server of a running site, give it requests again, or change its role, by hand."""

from __future__ import annotations

import argparse
import asyncio
from typing import TYPE_CHECKING

from sglang_prfaas.config import load
from sglang_prfaas.config.schema import ReportsConfig, RouterSite, SiteConfig
from sglang_prfaas.core.addresses import authority, base_url
from sglang_prfaas.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from sglang_prfaas.monitor.reports import Action

_TEXT = """\
Tell the agent of the site that FILE describes to do something with one of its servers, and wait until it is done:

  drain      no new requests; done once it holds none
  undrain    requests again
  prefill    drain it, make it a prefill server (/pd_role_switch), check its health, requests again
  decode     the same for decode
  limits     at most --max-requests at once through the agent; 0: any number

Goes over the agent's reports_port, with the keys in the site's keys_dir: run it where these are.
"""

CONNECT_TIMEOUT_S = 10.0
ACTIONS = ("drain", "undrain", "prefill", "decode", "limits")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch control`."""
    parser.description = _TEXT
    parser.add_argument("file", metavar="FILE", help="TOML file of the site")
    parser.add_argument("server", metavar="SERVER", help="name of the server")
    parser.add_argument("action", metavar="ACTION", choices=ACTIONS, help="what to do: " + ", ".join(ACTIONS))
    parser.add_argument(
        "--deadline", type=float, default=300.0, metavar="S", help="seconds that requests under way may take (300)"
    )
    parser.add_argument("--max-requests", type=int, metavar="N", help="for limits")
    parser.add_argument("--host", metavar="HOST", help="where the agent is (default: agent.host, or this machine)")


def run(args: argparse.Namespace) -> int:
    """Send the command; 0 once it is done. Raises LaunchError with the agent's reason where it is not."""
    config = load.load_site(args.file)
    if not config.agent.reports_port:
        raise ConfigError(f"{args.file}: agent.reports_port: the agent takes no commands without it; write a port")
    if args.action == "limits" and args.max_requests is None:
        raise ConfigError("limits needs --max-requests N")
    done, message = asyncio.run(_send(config, _action(args), args.deadline, args.host))
    if not done:
        raise LaunchError(f"{config.site.name}/{args.server}: {message}")
    print(f"{config.site.name}/{args.server}: {message}")
    return 0


def _action(args: argparse.Namespace) -> Action:
    from sglang_prfaas.monitor.reports import Drain, SetLimits, SwitchRole, Undrain

    if args.action == "drain":
        return Drain(args.server)
    if args.action == "undrain":
        return Undrain(args.server)
    if args.action == "limits":
        return SetLimits(args.server, args.max_requests)
    return SwitchRole(args.server, args.action)


async def _send(config: SiteConfig, action: Action, deadline_s: float, host: str | None) -> tuple[bool, str]:
    from sglang_prfaas.router.agent_links import AgentLinks
    from sglang_prfaas.site.commands import listening_host

    host = host or listening_host(config.agent.host)
    site = RouterSite(
        name=config.site.name,
        role=config.site.role,
        agent_url=base_url("http", host, config.agent.port),
        reports_port=config.agent.reports_port,
    )
    keys = ReportsConfig(security=config.transport.security, keys_dir=config.transport.keys_dir)
    links = AgentLinks([site], keys)
    links.start()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            while links.reports.state(site.name) is None:
                await asyncio.sleep(0.05)
        answer = await links.command(site.name, action, deadline_s)
    except TimeoutError:
        why = links.problem(site.name) or "nobody answers there"
        raise LaunchError(f"the agent of {site.name} at {authority(host, site.reports_port)}: {why}") from None
    finally:
        await links.stop()
    return answer.done, answer.message
