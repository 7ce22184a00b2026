"""Reading SGLang command lines: only what checks and the launcher need to know, without importing SGLang."""

from __future__ import annotations

from collections.abc import Sequence

OWNED = {
    "--model-path": "site.model",
    "--model": "site.model",
    "--served-model-name": "site.served_model_name",
    "--host": "servers.*.host",
    "--port": "servers.*.port",
    "--disaggregation-mode": "servers.*.role",
    "--disaggregation-transfer-backend": "site.transfer_backend",
    "--disaggregation-bootstrap-port": "servers.*.bootstrap_port",
}
"""SGLang options that a key of the configuration sets, and that key."""

_TP = ("--tensor-parallel-size", "--tp-size", "--tp")
_PP = ("--pipeline-parallel-size", "--pp-size")
_DP = ("--data-parallel-size", "--dp-size")


def has(args: Sequence[str], *names: str) -> bool:
    """Whether one of the options is given, as `--name value` or `--name=value`."""
    return any(arg.partition("=")[0] in names for arg in args)


def value(args: Sequence[str], *names: str) -> str | None:
    """The value of the last of the options given, None where none is."""
    found = None
    for index, arg in enumerate(args):
        name, equals, text = arg.partition("=")
        if name in names:
            found = text if equals else (args[index + 1] if index + 1 < len(args) else None)
    return found


def rank_count(args: Sequence[str]) -> int:
    """Ranks of one server that move KVCache: tensor times pipeline parallel, times data parallel outside attention."""
    ranks = _number(value(args, *_TP)) * _number(value(args, *_PP))
    return ranks if has(args, "--enable-dp-attention") else ranks * _number(value(args, *_DP))


def data_parallel_size(args: Sequence[str]) -> int:
    """Data-parallel ranks of one server, each with a scheduler and a cache of its own."""
    return _number(value(args, *_DP))


def switches_roles(args: Sequence[str]) -> bool:
    """Whether the server may turn from prefill to decode and back while it runs."""
    return has(args, "--enable-pd-role-switch")


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else 1
