"""`python -m sglang_prfaas.launch`: start sites and routers, check their configurations, plan, run the demo.

Exit status: 0 done, or stopped on request; 1 something could not be started or was given up; 2 the configuration or the
command line is wrong.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from sglang_prfaas.errors import ConfigError, PrfaasError

COMMANDS = {
    "site": "start one datacenter: its servers and its agent",
    "router": "start a router",
    "gateway": "join two sites of which only the prefilling one can dial",
    "check": "check configuration files and print what would run",
    "keys": "make the keys with which sites prove themselves to each other",
    "status": "show how running routers and sites are",
    "cache": "show what the prefix caches of running sites hold",
    "control": "drain a server of a running site, or change its role",
    "schema": "print the JSON Schema of the configuration files",
    "profile": "measure running servers and write what they can do as a profile file",
    "plan": "find the best threshold and roles for a fleet, and what they give",
    "simulate": "compare policies on a virtual clock",
    "demo": "two datacenters on this machine, compared with a single server",
}
"""Subcommands; each is a module of this package with `add_arguments(parser)` and `run(args) -> int`."""

WITH_OVERRIDES = ("site", "router", "check")
"""Subcommands that take a flag for every configuration key."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else ""
    try:
        parser = _parser(command)
        if command in WITH_OVERRIDES:
            from sglang_prfaas.config import flags

            arguments, overrides = flags.split(arguments)
            parser.set_defaults(overrides=overrides)
        args = parser.parse_args(arguments)
        status = importlib.import_module(f"{__package__}.{args.command}").run(args)
        assert isinstance(status, int)
        return status
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    except PrfaasError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read our output has enough of it (`| head`); nothing may be flushed to it at exit any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser(chosen: str) -> argparse.ArgumentParser:
    """The parser; only the chosen subcommand's module is imported, so that `--help` stays quick."""
    parser = argparse.ArgumentParser(
        prog="python -m sglang_prfaas.launch",
        description="Prefill-as-a-Service for SGLang: long prompts are prefilled in another datacenter.",
        epilog="exit status: 0 done or stopped on request, 1 something failed, 2 the configuration is wrong",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name == chosen:
            importlib.import_module(f"{__package__}.{name}").add_arguments(subparser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
