"""Where a server publishes its load, by its arguments. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from sglang_prfaas.config import sglang_args
from sglang_prfaas.core.addresses import base_url


class _KvEvents(Struct):
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None


def load_endpoints(args: Sequence[str], host: str) -> list[str]:
    """The ZeroMQ endpoints of a server's `LoadStat`s, one for each data-parallel rank; empty where it publishes none.

    host: an address to reach the server at. The rules are those of SGLang 0.5.23, `resolve_load_pub_range`: an explicit
    `tcp://*:PORT`, or `auto`, which is behind the ports of KV events and of their replay.

    This project does not add the option by itself: SGLang binds these sockets on every address, without keys, and only
    beside KV events; /v1/loads has the same figures, and more."""
    mode = (sglang_args.value(args, "--load-publish-endpoint") or "").strip()
    if not mode or mode.lower() == "off":
        return []
    ranks = sglang_args.data_parallel_size(args)
    first = _port(mode)
    if mode.lower() == "auto":
        try:
            events = msgspec.json.decode(sglang_args.value(args, "--kv-events-config") or "{}", type=_KvEvents)
        except msgspec.DecodeError:
            return []
        kv, replay = _port(events.endpoint), _port(events.replay_endpoint or "")
        first = kv + ranks if kv else 0
        if replay and first < replay + ranks and replay < first + ranks:
            first = replay + ranks
    return [base_url("tcp", host, first + rank) for rank in range(ranks)] if first else []


def _port(endpoint: str) -> int:
    try:
        return urlsplit(endpoint).port or 0
    except ValueError:
        return 0
