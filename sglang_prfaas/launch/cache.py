"""`launch cache`: what the prefix caches hold, as routers and agents see it, and what that saves."""

from __future__ import annotations

import argparse
from typing import Any

from sglang_prfaas.launch.asking import ask, endpoint_of
from sglang_prfaas.launch.tables import table, write_json

_TEXT = """\
Ask routers and agents what prefix caches hold: GET /cache of each.

TARGET is a TOML file of a router or a site, or the URL of a running one (with agent.tls: the file, where its keys are).
Of a router: the blocks that its index has of every server, hit rates as prefill servers told them, and what that saved.
Of an agent: the blocks of its own servers, and the counters of its prefix store.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch cache`."""
    parser.description = _TEXT
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="TOML file, or URL")
    parser.add_argument("--json", metavar="OUT", help="also write everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Ask and print; 0. Raises LaunchError for a target that does not answer."""
    found: dict[str, Any] = {}
    for target in args.targets:
        endpoint = endpoint_of(target)
        found[target] = ask(endpoint, "/cache")
        print(f"{target} ({endpoint.url})")
        print(render(found[target]), end="\n\n")
    if args.json:
        write_json(args.json, found)
    return 0


def render(answer: dict[str, Any]) -> str:
    """An answer as text."""
    if answer.get("enabled") is False:
        return "no index: prefix_index.enabled is false, or no site has a reports_port or kv_events"
    per_token, per_state = answer.get("bytes_per_token"), answer.get("state_bytes") or 0.0
    rows = []
    for cache in answer["caches"]:
        held = cache["held"] or {}
        tokens = cache["block_tokens"] * held.get("device", 0)
        size = f"{(tokens * per_token + held.get('states', 0) * per_state) / 2**20:.1f}" if per_token else "-"
        name = f"{cache.get('site', answer.get('site', ''))}/{cache['server']}"
        name += f" rank {cache['dp_rank']}" if cache["dp_rank"] else ""
        tiers = [str(held.get(tier, 0)) for tier in ("device", "host", "disk", "states")]
        rows.append([name, str(cache["block_tokens"]), *tiers, str(tokens), size])
    header = ["cache", "block", "device", "host", "disk", "checkpoints", "device tokens", "MiB"]
    lines = [table(header, rows), f"index: {answer['blocks']} of {answer['max_blocks']} blocks"]
    lines[-1] += f", {answer['index_bytes'] / 2**20:.1f} MiB, {answer['dropped_blocks']} left out"
    for name, figures in (("all sites", answer.get("figures")), *sorted((answer.get("sites") or {}).items())):
        if figures and figures["told_prompt_tokens"]:
            hit, told = figures["hit_tokens"], figures["told_prompt_tokens"]
            text = f"{name}: {hit} of {told} prompt tokens cached ({hit / told:.1%})"
            saved = f", {hit * per_token / 2**20:.1f} MiB of KV not computed again" if per_token else ""
            lines.append(f"{text}{saved}; {figures['broken_promises']} broken promises")
    stores = answer.get("store") or ()
    for store in stores:
        counters = store["counters"]
        read = counters["host_read_bytes"] + counters["backend_read_bytes"]
        written = counters["host_written_bytes"] + counters["backend_written_bytes"]
        used = store["host_used_bytes"] + store["backend_used_bytes"]
        lines.append(
            f"store of {store['name']} ({store['backend']}): {_mib(used)} held, {_mib(read)} read, "
            f"{_mib(written)} written, {counters['usable_pages']} of {counters['queried_pages']} pages asked for usable"
        )
    if stores:
        lines += _moved([store["counters"] for store in stores])
    if served := answer.get("served"):
        lines.append(f"sent to other sites: {_mib(served['bytes'])} in {served['objects']} pages and states")
    return "\n".join(lines)


def _moved(counters: list[dict[str, Any]]) -> list[str]:
    """What the stores of a site saved, and what crossed the link for it."""
    total = {name: sum(each[name] for each in counters) for name in counters[0]}
    read = total["host_read_bytes"] + total["backend_read_bytes"]
    lines = [f"saved: {_mib(read)} of KV and states read here, {_mib(total['fetched_bytes'])} fetched, not computed"]
    if total["fetch_questions"]:
        lines.append(
            f"moved: {_mib(total['fetched_bytes'])} from other sites, for {total['fetched_tokens']} tokens in "
            f"{total['fetches']} fetches ({total['fetch_failed']} failed, {total['fetch_refused']} slower than "
            f"computing); about {total['fetch_saved_s']:.1f} s saved"
        )
    return lines


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
