"""Entry point `sglang.srt.plugins`, name `prfaas`: run by SGLang in every process, before arguments are parsed.

Installing the package is all it takes for `--disaggregation-transfer-backend prfaas` to work. With another backend
nothing changes, whatever happens here; a server that asks for prfaas and cannot have all of it does not start.
"""

from __future__ import annotations

import itertools
import os
import sys

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.sglang_plugin import hooks

ALLOW_UNTESTED = "PRFAAS_ALLOW_UNTESTED_SGLANG"
"""Set to 1 to run with an SGLang version this release was not tested with."""

ASKED_FOR = "PRFAAS_ASKED_FOR"
"""Set for child processes by the server's first process, whose command line tells that it wants the backend."""


def register() -> None:
    """Install the backend. Ends the process with a message where it was asked for and cannot be had."""
    asked_for = _asked_for(sys.argv) or os.environ.get(ASKED_FOR) == "1"
    if asked_for:
        os.environ[ASKED_FOR] = "1"
    try:
        _check_version()
        hooks.install()
    except Exception as error:
        message = (
            "sglang_prfaas: the transfer backend prfaas is not available in this process:\n"
            + "".join(f"  - {line}\n" for line in str(error).splitlines() or [repr(error)])
            + f"Install the SGLang version it is tested with: pip install sglang=={hooks.TESTED_SGLANG[-1]}"
        )
        print(message, file=sys.stderr, flush=True)
        if asked_for:
            # Not an Exception, so SGLang's plugin loader cannot swallow it.
            raise SystemExit(3) from error


def _asked_for(argv: list[str]) -> bool:
    """Whether a server's command line names the backend, in either spelling of a flag's value."""
    flag = "--disaggregation-transfer-backend"
    return f"{flag}={hooks.BACKEND}" in argv or (flag, hooks.BACKEND) in itertools.pairwise(argv)


def _check_version() -> None:
    import sglang

    version = str(getattr(sglang, "__version__", "unknown"))
    if version not in hooks.TESTED_SGLANG and os.environ.get(ALLOW_UNTESTED) != "1":
        raise LaunchError(
            f"SGLang {version} is installed, tested are {', '.join(hooks.TESTED_SGLANG)}; "
            f"set {ALLOW_UNTESTED}=1 to try it all the same"
        )
