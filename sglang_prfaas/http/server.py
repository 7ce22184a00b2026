"""The HTTP/1.1 server: listens, admits connections, drains."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from msgspec import Struct

from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import LocalError, PeerError
from sglang_prfaas.http.errors import HttpError
from sglang_prfaas.http.peers import TlsPeers
from sglang_prfaas.http.server_connection import Handler, ServerConnection

_SWEEP_S = 1.0
_HANDSHAKE_S = 10.0


class ServerLimits(Struct, frozen=True, kw_only=True):
    """Limits of one server; the router's come from `RouterLimits`."""

    max_body_bytes: int = 64 << 20
    max_header_bytes: int = 64 << 10
    max_connections: int = 10_000
    keepalive_timeout_s: float = 75.0


class HttpServer:
    """Runs `handler(request, response)` for every request. Must be used from one event loop."""

    def __init__(
        self,
        handler: Handler,
        limits: ServerLimits | None = None,
        *,
        on_refused: Callable[[HttpError], None] | None = None,
    ) -> None:
        self.handler = handler
        self.limits = limits or ServerLimits()
        self.loop = asyncio.get_running_loop()
        self._on_refused = on_refused
        self._connections: set[ServerConnection] = set()
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None
        self._draining = False
        self._peers: TlsPeers | None = None

    async def start(
        self, host: str, port: int, *, ssl_context: ssl.SSLContext | None = None, peers: TlsPeers | None = None
    ) -> int:
        """Listen; port 0 takes any free one. With `peers`, only those are served, over TLS. Returns the port.

        Raises LocalError when the address is taken, ConfigError for certificates that do not fit."""
        self._peers = peers
        if peers is not None:
            ssl_context = peers.context()
        try:
            self._server = await self.loop.create_server(
                lambda: ServerConnection(self),
                host or None,
                port,
                ssl=ssl_context,
                backlog=2048,
                ssl_handshake_timeout=_HANDSHAKE_S if ssl_context is not None else None,
            )
        except OSError as exc:
            raise LocalError(f"cannot listen on {authority(host, port)}: {exc.strerror or exc}") from exc
        self._sweep = self.loop.call_later(_SWEEP_S, self._sweep_deadlines)
        return self.port

    @property
    def port(self) -> int:
        """The port listened on."""
        if self._server is None or not self._server.sockets:
            raise LocalError("the server is not listening")
        port = self._server.sockets[0].getsockname()[1]
        assert isinstance(port, int)
        return port

    @property
    def connections(self) -> int:
        return len(self._connections)

    @property
    def active(self) -> int:
        """Connections with a request in work."""
        return sum(not c.idle for c in self._connections)

    async def drain(self, timeout_s: float) -> bool:
        """Take no new connection, finish the requests in work, then close. False when some had to be cut."""
        self._draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.closing_after_response = True
            if connection.idle:
                connection.close()
        tasks = [c.task for c in self._connections if c.task is not None]
        unfinished = (await asyncio.wait(tasks, timeout=timeout_s))[1] if tasks else set()
        await self.close()
        return not unfinished

    async def close(self) -> None:
        """Close at once; requests in work are cancelled."""
        if self._sweep is not None:
            self._sweep.cancel()
        if self._server is not None:
            self._server.close()
        tasks = [c.task for c in self._connections if c.task is not None]
        for task in tasks:
            task.cancel()
        for connection in list(self._connections):
            connection.close()
        if tasks:
            await asyncio.wait(tasks)

    # --- called by connections --------------------------------------------------------------------------------------

    def check_peer(self, connection: ServerConnection) -> None:
        """Raises PeerError for an end whose certificate is not let in, or not any more."""
        if self._peers is not None:
            self._peers.check(connection.certificate)

    def admit(self, connection: ServerConnection) -> bool:
        """Whether a new connection is within max_connections."""
        self._connections.add(connection)
        if self._draining:
            connection.closing_after_response = True
        return len(self._connections) <= self.limits.max_connections

    def forget(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)

    def count_refused(self, error: HttpError) -> None:
        if self._on_refused is not None:
            self._on_refused(error)

    def _sweep_deadlines(self) -> None:
        """Close connections that were idle, took too long to send a request, or are of peers not let in any more."""
        now_s = self.loop.time()
        for connection in list(self._connections):
            try:
                self.check_peer(connection)
            except PeerError as exc:
                connection.refuse_peer(exc)
            if connection.deadline_s is not None and now_s > connection.deadline_s:
                connection.deadline_s = None
                connection.deadline_passed()
        self._sweep = self.loop.call_later(_SWEEP_S, self._sweep_deadlines)
