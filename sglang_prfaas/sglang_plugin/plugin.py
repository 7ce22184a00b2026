"""Entry point `sglang.srt.plugins`, name `prfaas`: run by SGLang in every process, before arguments are parsed.

Installing the package is all it takes for `--disaggregation-transfer-backend prfaas` and `--linear-attn-prefill-backend
prfaas` to work. With other backends nothing changes, whatever happens here; a server that asks for prfaas and cannot
have all of it does not start.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.sglang_plugin import hooks, inner_rail
from sglang_prfaas.sglang_plugin.inner_rail.packages import require
from sglang_prfaas.sglang_plugin.linear_attention import hooks as linear_attention

ALLOW_UNTESTED = "PRFAAS_ALLOW_UNTESTED_SGLANG"
"""Set to 1 to run with an SGLang version this release was not tested with."""


INNER_RAIL = "PRFAAS_INNER_RAIL"
"""`transport.inner_rail`, as the launcher hands it on."""


class Feature(NamedTuple):
    """What the value `prfaas` of a flag asks for.

    asked_for: environment variable set for child processes by the server's first process, whose command line tells.
    """

    name: str
    flag: str
    asked_for: str
    install: Callable[[], None]


FEATURES = (
    Feature("the transfer backend", "--disaggregation-transfer-backend", "PRFAAS_ASKED_FOR", hooks.install),
    Feature(
        "the linear attention prefill", linear_attention.FLAG, "PRFAAS_ASKED_FOR_PREFILL", linear_attention.install
    ),
)


def register() -> None:
    """Install every feature. Ends the process with a message where one was asked for and cannot be had."""
    for feature in FEATURES:
        _register(feature)
    if _asked_for(FEATURES[0].flag, sys.argv):
        _require_inner_rail()


def _require_inner_rail() -> None:
    """End a server's first process at once where the rail that its site is to have cannot be had."""
    kind = os.environ.get(INNER_RAIL, inner_rail.NONE)
    if kind == inner_rail.NONE:
        return
    try:
        require(kind)
    except LaunchError as error:
        print(f"sglang_prfaas: {error}", file=sys.stderr, flush=True)
        raise SystemExit(3) from error


def _register(feature: Feature) -> None:
    asked_for = _asked_for(feature.flag, sys.argv) or os.environ.get(feature.asked_for) == "1"
    if asked_for:
        os.environ[feature.asked_for] = "1"
    try:
        _check_version()
        feature.install()
    except Exception as error:
        message = (
            f"sglang_prfaas: {feature.name} prfaas is not available in this process:\n"
            + "".join(f"  - {line}\n" for line in str(error).splitlines() or [repr(error)])
            + f"Install the SGLang version it is tested with: pip install sglang=={hooks.TESTED_SGLANG[-1]}"
        )
        print(message, file=sys.stderr, flush=True)
        if asked_for:
            # Not an Exception, so SGLang's plugin loader cannot swallow it.
            raise SystemExit(3) from error


def _asked_for(flag: str, argv: list[str]) -> bool:
    """Whether a server's command line gives a flag the value prfaas, in either spelling."""
    return f"{flag}={hooks.BACKEND}" in argv or (flag, hooks.BACKEND) in itertools.pairwise(argv)


def _check_version() -> None:
    import sglang

    version = str(getattr(sglang, "__version__", "unknown"))
    if version not in hooks.TESTED_SGLANG and os.environ.get(ALLOW_UNTESTED) != "1":
        raise LaunchError(
            f"SGLang {version} is installed, tested are {', '.join(hooks.TESTED_SGLANG)}; "
            f"set {ALLOW_UNTESTED}=1 to try it all the same"
        )
