"""`launch status`: how running routers and sites are, in a few lines for people and an exit status for scripts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from sglang_prfaas.core.units import bytes_per_s_to_gbps
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.launch.asking import ask, endpoint_of
from sglang_prfaas.launch.tables import table, write_json

_TEXT = """\
Ask routers (GET /health) and agents (GET /site) how they are: servers, states, links.

TARGET is a TOML file of a router or a site, or the URL of a running one (with agent.tls: the file, where its keys are).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch status`."""
    parser.description = _TEXT
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="TOML file, or URL")
    parser.add_argument("--json", metavar="OUT", help="also write the answers as JSON")
    parser.epilog = "exit status: 0 every server of every target is ready, 1 one is not or a target does not answer"


def run(args: argparse.Namespace) -> int:
    """Ask and print; 0 where everything is ready, else 1."""
    found: dict[str, Any] = {}
    well = True
    for target in args.targets:
        endpoint = endpoint_of(target)
        try:
            found[target] = answer = _ask(endpoint)
        except LaunchError as error:
            print(f"error: {error}", file=sys.stderr)
            well = False
            continue
        ready, text = site_status(answer) if "role" in answer else router_status(answer)
        print(f"{target} ({endpoint.url}): {text}", end="\n\n")
        well = well and ready
    if args.json:
        write_json(args.json, found)
    return 0 if well else 1


def _ask(endpoint: Any) -> dict[str, Any]:
    """What `GET /site` of an agent says, or else `GET /health` of a router. Raises LaunchError."""
    health: dict[str, Any] = ask(endpoint, "/health", statuses=(200, 503))
    answer = health if "servers" in health else ask(endpoint, "/site")
    if not isinstance(answer, dict) or not isinstance(answer.get("servers"), list):
        raise LaunchError(f"{endpoint.url}: this answer is none of a router or an agent")
    return answer


def router_status(answer: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether all servers are alive, and an answer to `GET /health` of a router as text."""
    servers = answer["servers"]
    rows = [
        [f"{each['site']}/{each['name']}", each["role"], "alive" if each["alive"] else "down", each["error"] or ""]
        for each in servers
    ]
    alive = sum(each["alive"] for each in servers)
    head = f"router, {answer['status']}; {alive} of {len(servers)} servers alive"
    head += f", t {answer['threshold_tokens']:g} tokens"
    errors = answer.get("agent_errors") or {}
    well = alive == len(servers) > 0 and answer["status"] == "ok" and not errors
    text = _with_table(head, ["server", "role", "state", "last error"], rows)
    return well, "\n".join([text, *(f"agent of site {site}: {error}" for site, error in errors.items())])


def site_status(answer: Mapping[str, Any]) -> tuple[bool, str]:
    """The same of an agent's answer to `GET /site`."""
    servers = answer["servers"]
    rows = [
        [each["name"], each["role"], each["state"], str(each["restarts"]), each.get("change", "")] for each in servers
    ]
    ready = sum(each["state"] == "ready" for each in servers)
    head = f"site {answer['name']} ({answer['role']}), {ready} of {len(servers)} servers ready"
    head += ", stopping" if answer["draining"] else ""
    text = _with_table(head, ["server", "role", "state", "restarts", "change"], rows)
    measured = [_link(link) for link in answer.get("links") or ()]
    known = {link["to_site"] for link in answer.get("links") or () if link["from_site"] == answer["name"]}
    measured += [
        f"link to {link['to_site']}: {link['capacity_gbps']:g} Gbit/s configured, nothing sent yet"
        for link in answer.get("configured_links") or ()
        if link["to_site"] not in known
    ]
    return ready == len(servers) and not answer["draining"], "\n".join([text, *measured])


def _link(link: Mapping[str, Any]) -> str:
    used, capacity = (bytes_per_s_to_gbps(link.get(f"{key}_bytes_per_s", 0.0)) for key in ("used", "capacity"))
    text = f"link {link['from_site']} to {link['to_site']}: {used:.3g} of {capacity:.3g} Gbit/s used"
    text += f", {link.get('connections', 0)} connections, round trip {link.get('rtt_s', 0.0) * 1000:.2f} ms"
    return text + (f", congested ({link.get('congestion', '')})" if link.get("congested") else "")


def _with_table(head: str, header: list[str], rows: list[list[str]]) -> str:
    return f"{head}\n{table(header, rows)}" if rows else head
