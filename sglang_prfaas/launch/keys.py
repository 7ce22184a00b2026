"""`launch keys`: the keys with which the sites of a deployment prove themselves to each other."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path

from sglang_prfaas.config.addresses import network_problem
from sglang_prfaas.errors import ConfigError

_TEXT = """\
Make the keys of a deployment in DIR: an authority (ca.crt, ca.key), and for each site a directory DIR/NAME to copy to
its machines, as it is, and to name in transport.keys_dir of its file. What exists is never overwritten: run it again to
add a site, or after editing DIR/peers.toml, whose copy every site's directory has.

  python -m sglang_prfaas.launch keys keys --site pd=10.2.0.0/24 --site prfaas=10.1.0.11,10.1.0.12

Keep ca.key where keys are made; no server needs it.

To exchange a site's keys: --roll NAME; copy peers.toml to every site, which read it at once; copy DIR/NAME to its site
and restart its servers, one after the other; --retire NAME; copy peers.toml to every site again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `launch keys`."""
    parser.description = _TEXT
    parser.add_argument("directory", metavar="DIR", type=Path, help="where the keys are, or are to be")
    parser.add_argument(
        "--site",
        action="append",
        default=[],
        metavar="NAME[=HOST,...]",
        help="a site, and where its prefill servers are dialled (addresses, networks, names), for its key only",
    )
    parser.add_argument("--days", type=int, metavar="N", help="how long new certificates hold (default: 730)")
    exchange = parser.add_mutually_exclusive_group()
    exchange.add_argument("--roll", metavar="NAME", help="new keys for a site; the old ones hold until --retire")
    exchange.add_argument("--retire", metavar="NAME", help="let the old keys of a site in no longer, and delete them")


def run(args: argparse.Namespace) -> int:
    """Make keys; returns 0. Raises ConfigError."""
    from sglang_prfaas.transport.security import make

    days = make.DEFAULT_DAYS if args.days is None else args.days
    if days < 1:
        raise ConfigError(f"--days: expected at least 1, got {days}")
    if args.site and (args.roll or args.retire):
        raise ConfigError("--site makes keys, --roll and --retire exchange them; give one of them")
    sites: dict[str, tuple[str, ...]] = {}
    for text in args.site:
        name, _, hosts = text.partition("=")
        sites[name] = tuple(host.strip() for host in hosts.split(",") if host.strip())
        if problems := [problem for host in sites[name] if (problem := network_problem(host))]:
            raise ConfigError([f"--site {name}: {problem}" for problem in problems])
    now = datetime.datetime.now(datetime.UTC)
    try:
        if args.roll:
            done = make.roll(args.directory, args.roll, days=days, now=now)
        elif args.retire:
            done = make.retire(args.directory, args.retire)
        else:
            done = make.make_keys(args.directory, sites, days=days, now=now)
    except OSError as error:
        raise ConfigError(f"{error.filename or args.directory}: {error.strerror}") from None
    for line in done or [f"{args.directory}: nothing to do"]:
        print(line)
    return 0
