"""`launch profile`: what running servers can do, measured, as a profile file."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import os
import shlex
import sys
from pathlib import Path

import msgspec

from sglang_prfaas import __version__
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.launch.profile_report import print_report
from sglang_prfaas.launch.tables import write_json
from sglang_prfaas.scheduler.profiles import save_profile

_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch profile`."""
    parser.description = (
        "Measure running servers, one after the other, and write a profile file for `launch plan`, `launch simulate`\n"
        "and the router's policy.profile:\n"
        "  - T_prefill(l) of each hardware: single prefills of unique prompts over a grid of lengths\n"
        "  - T_decode: time of a step against the number of concurrent streams\n"
        "  - S_kv(l): from the model's config.json, checked against the bytes that really moved\n"
        "  - the link between the sites: rate of one transfer and of several at once, round trip\n"
        "Servers should have nothing else to do. A hardware's first server stands for all of it. Plain servers (no\n"
        "PD) are measured, too. Nothing is written before all is done; Ctrl-C leaves no file behind."
    )
    parser.epilog = (
        "examples:\n"
        "  launch profile router.toml --transfer-log /var/log/prfaas/transfers.jsonl --out profile.json\n"
        "  launch profile --prefill H200=http://10.1.0.11:30000 --prefill H20=http://10.2.0.21:30000 \\\n"
        "      --decode H20=http://10.2.0.21:30001 --lengths 1000,8000,32000,128000\n"
        "exit status: 0 written, 1 a server is down, busy or fails, 2 the command line or a file is wrong, 130 Ctrl-C"
    )
    where = parser.add_argument_group("servers")
    where.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="the router's TOML file (its sites' agents or servers), or files of sites",
    )
    where.add_argument(
        "--hardware",
        action="append",
        default=[],
        metavar="SITE=NAME",
        help="name of a site's curves (default: sites.SITE.hardware of the router's file, else the site's name)",
    )
    where.add_argument("--prefill", action="append", default=[], metavar="NAME=URL", help="a prefill or plain server")
    where.add_argument("--decode", action="append", default=[], metavar="NAME=URL", help="a decode or plain server")
    where.add_argument("--gpus", action="append", default=[], metavar="NAME=N", help="GPUs of an instance of NAME")
    where.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="sent with every request")
    where.add_argument("--allow-busy", action="store_true", help="measure servers that have other requests in work")
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--lengths", metavar="N,N", help="prompt lengths (default: doubling from --min-tokens to --max-tokens)"
    )
    what.add_argument("--min-tokens", type=int, default=512, metavar="N", help="shortest prompt (default: 512)")
    what.add_argument(
        "--max-tokens", type=int, default=131_072, metavar="N", help="longest one, if the server takes it (131072)"
    )
    what.add_argument("--batches", metavar="N,N", help="concurrent streams (default: doubling, up to --max-batch)")
    what.add_argument("--max-batch", type=int, default=64, metavar="N", help="most streams (default: 64)")
    what.add_argument(
        "--contexts", default="2048", metavar="N,N", help="prompt tokens of a stream (2048); the longest is the curve"
    )
    what.add_argument("--window", type=int, default=32, metavar="N", help="tokens that a step time is taken over (32)")
    what.add_argument("--repeats", type=int, default=5, metavar="N", help="of every figure, after one warm-up (5)")
    what.add_argument("--budget-s", type=float, default=600.0, metavar="S", help="time for all of it (default: 600)")
    what.add_argument(
        "--transfer-log",
        metavar="FILE",
        help="PRFAAS_TRANSFER_LOG of the decode servers, if it can be read here (default: as the sites' files say)",
    )
    what.add_argument(
        "--at-once",
        type=int,
        default=4,
        metavar="N",
        help="transfers side by side when the link is measured, beside one at a time (4)",
    )
    what.add_argument("--model-config", metavar="PATH", help="the model's config.json (default: as the servers say)")
    result = parser.add_argument_group("results")
    result.add_argument("--out", default="profile.json", metavar="FILE", help="the profile (default: profile.json)")
    result.add_argument("--json", metavar="OUT", help="also write the profile with every sample")


def run(args: argparse.Namespace) -> int:
    """Measure and write; returns the exit status."""
    _check(args)
    try:
        return asyncio.run(_run(args))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return _INTERRUPTED


async def _run(args: argparse.Namespace) -> int:
    from sglang_prfaas.config import load
    from sglang_prfaas.http import Client
    from sglang_prfaas.profiler.model_config import read_model
    from sglang_prfaas.profiler.run import Profiler, Settings
    from sglang_prfaas.profiler.targets import Role, find_targets, places_of
    from sglang_prfaas.router.agent_tls import require_agents
    from sglang_prfaas.transport.security import SiteTls, load_security

    named: list[tuple[Role, str]] = [("prefill", text) for text in args.prefill]
    named += [("decode", text) for text in args.decode]
    found = places_of(args.files, named, _names(args.hardware))
    settings = Settings(
        lengths=_numbers("--lengths", args.lengths),
        min_tokens=args.min_tokens,
        max_tokens=args.max_tokens,
        batches=_numbers("--batches", args.batches),
        max_batch=args.max_batch,
        contexts=_numbers("--contexts", args.contexts),
        window_tokens=args.window,
        repeats=args.repeats,
        budget_s=args.budget_s,
        transfer_log=args.transfer_log or found.transfer_log,
        at_once=args.at_once,
        gpus=_gpus(args.gpus),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "sglang_prfaas.launch", *sys.argv[1:]]),
        version=__version__,
        allow_busy=args.allow_busy,
    )
    client = Client()
    for file in args.files:
        if load.kind_of(file) == "router":
            router = load.load_router(file)
            require_agents(client, router.sites, router.reports)
            continue
        site = load.load_site(file)
        if site.agent.port and site.agent.tls:
            peers = SiteTls(load_security(site.transport), listens=False, site=site.site.name)
            for place in found.places:
                if place.site == site.site.name:
                    client.require(place.url, peers)
    try:
        targets = await find_targets(client, found.places, _headers(args.header))
        path = args.model_config or found.model or targets[0].info.model_path
        facts = read_model(path, must_exist=bool(args.model_config))
        outcome = await Profiler(targets, facts, settings, _say).run()
    finally:
        await client.close()
    save_profile(outcome.profile, args.out)
    if args.json:
        write_json(args.json, {"command": "profile", **msgspec.structs.asdict(outcome)})
    print_report(outcome.profile, args.out)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What argparse cannot see. Raises ConfigError with every problem."""
    problems = []
    if Path(args.out).suffix != ".json":
        problems.append(f"--out {args.out}: a profile is written as JSON; let its name end with .json")
    for path in filter(None, (args.out, args.json)):
        folder = Path(path).absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            problems.append(f"{path}: {folder} is no directory that can be written to")
    if not 0 < args.min_tokens <= args.max_tokens:
        problems.append("--min-tokens must be positive and not above --max-tokens")
    for name, low in (("max_batch", 1), ("window", 4), ("repeats", 1), ("budget_s", 1), ("at_once", 1)):
        if getattr(args, name) < low:
            problems.append(f"--{name.replace('_', '-')} {getattr(args, name):g}: must be at least {low}")
    if problems:
        raise ConfigError(problems)


def _numbers(flag: str, text: str | None) -> list[int]:
    try:
        found = sorted({int(part) for part in (text or "").split(",") if part.strip()})
    except ValueError:
        found = [0]
    if found and found[0] < 1:
        raise ConfigError(f"{flag} {text}: must be whole numbers above zero with commas between them")
    return found


def _names(texts: list[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        site, _, name = text.partition("=")
        if not site or not name:
            raise ConfigError(f"--hardware {text}: must be SITE=NAME, such as east=H200")
        found[site] = name
    return found


def _gpus(texts: list[str]) -> dict[str, int]:
    found = {}
    for text in texts:
        name, _, count = text.partition("=")
        if not name or not count.isdecimal() or int(count) < 1:
            raise ConfigError(f"--gpus {text}: must be NAME=N, such as H200=8")
        found[name] = int(count)
    return found


def _headers(texts: list[str]) -> list[tuple[bytes, bytes]]:
    found = []
    for text in texts:
        name, colon, value = text.partition(":")
        if not colon or not name.strip():
            raise ConfigError("--header: must be NAME:VALUE, such as 'authorization: Bearer KEY'")
        found.append((name.strip().lower().encode(), value.strip().encode()))
    return found


def _say(text: str) -> None:
    print(f"profile: {text}", file=sys.stderr, flush=True)
