"""What the subcommands with a configuration file have in common: the help of its flags, and reading it."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Iterable

from msgspec import Struct

from sglang_prfaas.config import flags
from sglang_prfaas.config.checks import Finding

_HOW = """\
configuration keys
  Each can be written in FILE, or given as a flag, which wins: --KEY VALUE or --KEY=VALUE. With no FILE, all come from
  flags. NAME stands for the name of an item of a list, or its index; a name that is not there yet adds an item.
  ARGS is one shell-quoted string (--site.args "--dtype float16") or a TOML array.
  TABLE is a TOML inline table; a single variable is --KEY.VARIABLE TEXT.
"""


def describe_keys(parser: argparse.ArgumentParser, *kinds: type[Struct]) -> None:
    """Append every configuration key to the help text."""
    parts = [_HOW]
    for kind in kinds:
        if len(kinds) > 1:
            title = (kind.__doc__ or kind.__name__).split(":")[0].rstrip(".")
            parts.append(f"{title}\n{'-' * len(title)}")
        parts.append(flags.help_text(kind))
    parts.append("exit status: 0 stopped on request, 1 something failed, 2 the configuration is wrong")
    parser.epilog = "\n".join(parts)


def print_warnings(findings: Iterable[Finding]) -> None:
    """Say on stderr what is allowed but may not be meant."""
    for finding in findings:
        if not finding.fatal:
            say(f"warning: {finding}")


def say(text: str) -> None:
    """One line on stderr. Where that cannot be written (a file on a full disk), there is nobody to tell, and no reason
    to serve nothing."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def log_to_stderr() -> None:
    """Send the package's log there, from INFO on."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
