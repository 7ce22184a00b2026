"""The role each server has now: `/pd_role_switch` changes it while the server runs, and a restart takes it back."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from sglang_prfaas.http import Client
from sglang_prfaas.http.errors import UpstreamError
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.server import Server

logger = logging.getLogger(__name__)

SWITCH_FLAG = "--enable-pd-role-switch"
ANSWER_TIMEOUT_S = 10.0


class _Disaggregation(Struct):
    mode: str = ""


class _Load(Struct):
    disaggregation: _Disaggregation | None = None


class _Loads(Struct):
    loads: list[_Load] = []


def role_in(body: bytes) -> str:
    """The role in an answer of SGLang's `GET /v1/loads`: prefill, decode, or empty where it does not tell."""
    try:
        answer = msgspec.json.decode(body, type=_Loads)
    except msgspec.DecodeError:
        return ""
    mode = answer.loads[0].disaggregation.mode if answer.loads and answer.loads[0].disaggregation else ""
    return mode if mode in ("prefill", "decode") else ""


class Roles:
    """Asks the servers that may change their role, every `interval_s` seconds. Belongs to one event loop."""

    def __init__(self, servers: Mapping[str, Server], interval_s: float) -> None:
        self._servers = servers
        self._interval_s = interval_s
        self._now: dict[str, str] = {}

    def of(self, name: str) -> str:
        """The role of a server: the one last seen, or else the one it was started in."""
        return self._now.get(name) or self._servers[name].command.role or ""

    async def watch(self, client: Client) -> None:
        """Keep up to date, until cancelled."""
        while True:
            for server in self._servers.values():
                if SWITCH_FLAG in server.command.argv:
                    await self._ask(client, server)
            await asyncio.sleep(self._interval_s)

    async def _ask(self, client: Client, server: Server) -> None:
        if server.state is not State.READY:
            self._now.pop(server.name, None)
            return
        try:
            answer = await client.upstream(server.url).fetch("GET", "/v1/loads", timeout_s=ANSWER_TIMEOUT_S)
        except UpstreamError:
            return  # its health check tells more than this would
        role = role_in(answer.body) if answer.status == 200 else ""
        if role and role != self.of(server.name):
            logger.info("server %s has the role %s now", server.name, role)
        if role:
            self._now[server.name] = role
