"""Watches the load and the role of a site's servers: asks each, and listens to those that publish.

`/v1/loads` costs SGLang's scheduler nothing: the HTTP process reads it from shared memory. A server that does not have
it is asked for `/metrics`. `/pd_role_switch` changes a role while the server runs; a restart takes that back.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import zmq
import zmq.asyncio

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.http import Client, UpstreamError
from sglang_prfaas.monitor.reports import ServerLoad
from sglang_prfaas.monitor.server_load import ServerLoadTracker
from sglang_prfaas.monitor.sglang_loads import LOAD_TOPIC, Figures, parse_load_stat, parse_loads, parse_metrics
from sglang_prfaas.site.commands import listening_host
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.load_endpoints import load_endpoints
from sglang_prfaas.site.server import Server

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 10.0
_RUNNING = (State.READY, State.UNHEALTHY)
_HIGH_WATER_MARK = 64
_MAX_STAT_BYTES = 64 << 10


class LoadWatch:
    """The newest load and role of each server. Belongs to one event loop."""

    def __init__(
        self, servers: Mapping[str, Server], interval_s: float, clock: Clock, on_role: Callable[[], None] | None = None
    ) -> None:
        """on_role: called when a server has another role than before."""
        self._servers = servers
        self._interval_s = interval_s
        self._on_role = on_role or (lambda: None)
        self._trackers = {name: ServerLoadTracker(name, clock) for name in servers}
        self._told = dict.fromkeys(servers, "")
        self._silent: set[str] = set()

    def role(self, name: str) -> str:
        """The role of a server: the one it told last, or else the one it was started in."""
        return self._trackers[name].role or self._servers[name].command.role or ""

    def load(self, name: str) -> ServerLoad | None:
        """The load of a server with its age, None where nothing is known."""
        return self._trackers[name].load(self.role(name))

    def loads(self) -> list[ServerLoad]:
        """The load of every server that has told of it."""
        found = (self.load(name) for name in self._servers)
        return [load for load in found if load is not None]

    async def watch(self, client: Client) -> None:
        """Keep up to date, until cancelled."""
        context = zmq.asyncio.Context()
        try:
            async with asyncio.TaskGroup() as tasks:
                for server in self._servers.values():
                    tasks.create_task(self._poll(client, server))
                    endpoints = load_endpoints(server.command.argv, listening_host(server.command.host))
                    for rank, endpoint in enumerate(endpoints):
                        tasks.create_task(self._listen(context, server, endpoint, rank, len(endpoints)))
        finally:
            context.destroy(linger=0)

    async def look(self, client: Client, name: str) -> None:
        """Ask one server now. What it does not answer is not known; its health check tells more than an error would."""
        server = self._servers[name]
        figures = await self._ask(client, server)
        if figures is not None and server.state in _RUNNING:
            self._trackers[name].polled(figures)
            self._notice_role(name)

    async def _poll(self, client: Client, server: Server) -> None:
        while True:
            if server.state in _RUNNING:
                await self.look(client, server.name)
            else:
                self._trackers[server.name].reset()
                self._notice_role(server.name)
            await asyncio.sleep(self._interval_s)

    async def _ask(self, client: Client, server: Server) -> Figures | None:
        upstream = client.upstream(server.url)
        problem = ""
        for path, parse in (("/v1/loads", parse_loads), ("/metrics", parse_metrics)):
            try:
                answer = await upstream.fetch("GET", path, timeout_s=ANSWER_TIMEOUT_S)
                if answer.status == 200:
                    figures = parse(answer.body)
                    self._silent.discard(server.name)
                    return figures
                problem = problem or f"{path} answered {answer.status}"
            except UpstreamError:
                return None
            except ProtocolError as error:
                problem = problem or str(error)
        if server.name not in self._silent:
            logger.warning("server %s does not tell its load: %s", server.name, problem)
            self._silent.add(server.name)
        return None

    async def _listen(self, context: zmq.asyncio.Context, server: Server, endpoint: str, rank: int, ranks: int) -> None:
        socket = context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, _HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_STAT_BYTES)
        socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SUBSCRIBE, LOAD_TOPIC)
        socket.connect(endpoint)
        try:
            while True:
                frames = await socket.recv_multipart()
                if server.state not in _RUNNING:
                    continue
                try:
                    _, figures = parse_load_stat(frames)
                except ProtocolError as error:
                    logger.warning("server %s at %s: %s; listening no more", server.name, endpoint, error)
                    return
                self._trackers[server.name].published(figures, rank, ranks)
        finally:
            socket.close(linger=0)

    def _notice_role(self, name: str) -> None:
        role = self.role(name)
        if role != self._told[name]:
            if self._told[name]:
                logger.info("server %s has the role %s now", name, role)
            self._told[name] = role
            self._on_role()
