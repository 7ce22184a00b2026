"""The ids of LoRA adapters that a site's servers have, so that routers can tell their prefixes.

SGLang mixes the id into the block hashes that it publishes, and tells it in `/server_info` only: for the adapters that
a server was started with. An adapter that is loaded later has an id that nobody is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import msgspec
from msgspec import Struct

from sglang_prfaas.config import sglang_args
from sglang_prfaas.http import Client, UpstreamError
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.server import Server

logger = logging.getLogger(__name__)

OPTION = "--lora-paths"
ANSWER_TIMEOUT_S = 10.0


class AdapterWatch:
    """By server, for those that were started with adapters. Belongs to one event loop."""

    def __init__(self, servers: Mapping[str, Server], interval_s: float, on_change: Callable[[], None]) -> None:
        """interval_s: between two looks at whether a server has started. on_change: called after one told its ids."""
        self._servers = {
            name: server for name, server in servers.items() if sglang_args.has(server.command.argv, OPTION)
        }
        self._interval_s = interval_s
        self._on_change = on_change
        self._told: dict[str, tuple[int | None, dict[str, str]]] = {}

    def ids(self, server: str) -> dict[str, str]:
        """Ids by name of a server's adapters, as far as its process of now has told them."""
        pid, ids = self._told.get(server, (None, {}))
        return ids if pid is not None and pid == self._servers[server].pid else {}

    async def watch(self, client: Client) -> None:
        """Ask every server after each of its starts, until cancelled."""
        if not self._servers:
            return
        while True:
            for server in self._servers.values():
                if server.state is State.READY and self._told.get(server.name, (None,))[0] != server.pid:
                    await self._ask(client, server)
            await asyncio.sleep(self._interval_s)

    async def _ask(self, client: Client, server: Server) -> None:
        pid = server.pid
        try:
            answer = await client.upstream(server.url).fetch("GET", "/server_info", timeout_s=ANSWER_TIMEOUT_S)
            ids = adapter_ids(answer.body) if answer.status == 200 else {}
        except UpstreamError as error:  # it is busy or gone: asked again
            logger.info("server %s does not tell its adapters' ids: %s", server.name, error)
            return
        except msgspec.DecodeError as error:
            logger.warning("server %s: /server_info names no ids of adapters: %s", server.name, error)
            ids = {}
        self._told[server.name] = (pid, ids)
        self._on_change()


class _Adapter(Struct):
    lora_name: str
    lora_id: str


class _ServerInfo(Struct):
    lora_paths: list[_Adapter] | None = None


def adapter_ids(server_info: bytes) -> dict[str, str]:
    """Ids by name, of SGLang's `/server_info`. Raises msgspec.DecodeError."""
    listed = msgspec.json.decode(server_info, type=_ServerInfo).lora_paths or []
    return {adapter.lora_name: adapter.lora_id for adapter in listed}
