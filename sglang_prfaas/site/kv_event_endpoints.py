"""Where a server publishes its KV events: chosen by the site, unless its arguments say so already. Pure but for ports.

SGLang's publisher has neither keys nor encryption. A server with one cache therefore gets Unix sockets in a directory
of the agent's, which nobody else may enter; SGLang numbers the ports of data-parallel ranks, so those get ports on
loopback.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack

import msgspec
from msgspec import Struct

from sglang_prfaas.config import sglang_args
from sglang_prfaas.core.addresses import base_url
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.monitor.kv_subscriber import KvEventSource
from sglang_prfaas.prefix_cache.matching import Holder

OPTION = "--kv-events-config"
_TRIES = 64


class KvEventsConfig(Struct, frozen=True, omit_defaults=True):
    """SGLang's value of `--kv-events-config`, as far as subscribing needs it; other keys are left alone."""

    publisher: str = "null"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    bind: bool | None = None
    format: str = "default"


def chosen_config(args: Sequence[str], directory: str, number: int) -> KvEventsConfig:
    """Endpoints for server `number` of a site. directory: of the Unix sockets. Raises LaunchError where no ports are
    free."""
    ranks = sglang_args.data_parallel_size(args)
    if ranks == 1:
        return KvEventsConfig("zmq", f"ipc://{directory}/{number}", f"ipc://{directory}/{number}r")
    first = _free_range(2 * ranks)
    return KvEventsConfig("zmq", f"tcp://127.0.0.1:{first}", f"tcp://127.0.0.1:{first + ranks}", bind=True)


def given_config(args: Sequence[str]) -> KvEventsConfig | None:
    """What a server's arguments say, None where they say nothing, or nothing that can be subscribed to."""
    text = sglang_args.value(args, OPTION)
    if not text:
        return None
    try:
        config = msgspec.json.decode(text, type=KvEventsConfig)
    except msgspec.DecodeError:
        return None
    usable = config.publisher == "zmq" and config.format == "default"
    return config if usable and all(map(_is_whole, (config.endpoint, config.replay_endpoint or "ipc://"))) else None


def option(config: KvEventsConfig) -> tuple[str, str]:
    """The option and its value for a server's command line."""
    return OPTION, msgspec.json.encode(config).decode()


def sources(site: str, server: str, config: KvEventsConfig, ranks: int, host: str) -> list[KvEventSource]:
    """What to subscribe to, one for each data-parallel rank. host: an address to reach the server at."""
    return [
        KvEventSource(
            Holder(site, server, rank),
            _dialled(config.endpoint, rank, host),
            replay_endpoint=_dialled(config.replay_endpoint or "", rank, host),
            topic=config.topic,
            infer_states=True,
        )
        for rank in range(ranks)
    ]


def _is_whole(endpoint: str) -> bool:
    return not endpoint.startswith("tcp://") or endpoint.rpartition(":")[2].isdecimal()


def _dialled(endpoint: str, rank: int, host: str) -> str:
    """An endpoint as a subscriber reaches it: rank r is r ports further on, and every address is `host`."""
    if not endpoint.startswith("tcp://"):
        return endpoint
    where, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return base_url("tcp", host if where in ("*", "0.0.0.0", "[::]") else where, int(port) + rank)


def _free_range(count: int) -> int:
    """The first of `count` consecutive ports on loopback that are free now."""
    for _ in range(_TRIES):
        with ExitStack() as held, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first = int(probe.getsockname()[1])
            try:
                for port in range(first + 1, first + count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except (OSError, OverflowError):
                continue
            return first
    raise LaunchError(f"no {count} consecutive free ports on 127.0.0.1 for KV events; set agent.kv_events = false")
