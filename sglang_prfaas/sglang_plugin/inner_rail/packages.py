"""Whether a rail can be had on this machine."""

from __future__ import annotations

import importlib

from sglang_prfaas.errors import LaunchError

_NEEDS = {
    "mooncake": (
        "mooncake.engine",
        "pip install 'sglang-prfaas[mooncake]' (with GPUs: mooncake-transfer-engine), and on Debian apt-get install "
        "libibverbs1",
    )
}
"""Module and how to get it, by rail."""


def require(kind: str) -> None:
    """Raises LaunchError that says what to install where a rail's package does not load."""
    if kind not in _NEEDS:
        raise LaunchError(f"transport.inner_rail is {kind!r}, expected one of {', '.join(('none', *_NEEDS))}")
    module, remedy = _NEEDS[kind]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise LaunchError(f"transport.inner_rail is {kind}, but {module} does not load: {error}; {remedy}") from error
