"""The HTTP/1.1 client: one pool of kept-alive connections per upstream server."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from urllib.parse import urlsplit

from msgspec import Struct

from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import ConfigError, PeerError
from sglang_prfaas.http.client_connection import ClientConnection
from sglang_prfaas.http.errors import UpstreamConnectError, UpstreamError, UpstreamProtocolError, UpstreamStaleError
from sglang_prfaas.http.exchange import DecodingExchange, Exchange, ResponseSink
from sglang_prfaas.http.messages import Headers, ResponseHead, encode_headers, encode_request_head
from sglang_prfaas.http.peers import TlsPeers

_SWEEP_S = 0.25


class ClientLimits(Struct, frozen=True, kw_only=True):
    """Timeouts and pool sizes of a client; the router's come from `RouterLimits`."""

    connect_timeout_s: float = 5.0
    first_byte_timeout_s: float = 600.0
    idle_timeout_s: float = 300.0
    # Below the 5 s after which SGLang's server closes an idle connection, so that a reused one is rarely stale.
    pool_idle_s: float = 4.0
    pool_connections: int = 512


class FetchedResponse(Struct, frozen=True):
    """A complete answer, without transfer coding."""

    status: int
    headers: Headers
    body: bytes


class Client:
    """Upstreams by URL, and the timeouts of all exchanges. Must be used from one event loop."""

    def __init__(self, limits: ClientLimits | None = None, *, ssl_context: ssl.SSLContext | None = None) -> None:
        self.limits = limits or ClientLimits()
        self.ssl_context = ssl_context
        self.peers: dict[tuple[str, int], TlsPeers] = {}
        """By host and port: whom https connections there have to reach, and what they show."""
        self.loop = asyncio.get_running_loop()
        self._upstreams: dict[str, Upstream] = {}
        self._exchanges: set[Exchange] = set()
        self._sweep: asyncio.TimerHandle | None = self.loop.call_later(_SWEEP_S, self._sweep_deadlines)

    def require(self, url: str, peers: TlsPeers) -> None:
        """From now on, https connections to the host and port of a URL are for `peers` only. Raises ConfigError."""
        where = Upstream(self, url)
        self.peers[where.host, where.port] = peers

    def upstream(self, url: str) -> Upstream:
        """The upstream of a base URL (http or https, a path is a prefix of every target). Raises ConfigError."""
        key = url.rstrip("/")
        found = self._upstreams.get(key)
        if found is None:
            found = self._upstreams[key] = Upstream(self, key)
        return found

    async def close(self) -> None:
        """Fail all exchanges and close all connections."""
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        for exchange in list(self._exchanges):
            exchange.cancel()
        for upstream in self._upstreams.values():
            upstream.close()
        await asyncio.sleep(0)

    def track(self, exchange: Exchange) -> None:
        self._exchanges.add(exchange)

    def forget(self, exchange: Exchange) -> None:
        self._exchanges.discard(exchange)

    def _sweep_deadlines(self) -> None:
        now_s = self.loop.time()
        for exchange in list(self._exchanges):
            exchange.check_deadline(now_s)
        for upstream in self._upstreams.values():
            upstream.drop_idle(now_s - self.limits.pool_idle_s)
        self._sweep = self.loop.call_later(_SWEEP_S, self._sweep_deadlines)


class Upstream:
    """One server: where it is, and its idle connections (most recently used first)."""

    def __init__(self, client: Client, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"an upstream needs a URL such as http://host:port, got {url!r}")
        self.client = client
        self.url = url
        self.host = parts.hostname
        self.tls = parts.scheme == "https"
        self.port = parts.port or (443 if self.tls else 80)
        self.base_path = parts.path.rstrip("/").encode("ascii")
        named = authority(self.host, self.port)
        self.authority = named.encode("idna" if not named.isascii() else "ascii")
        self._idle: deque[ClientConnection] = deque()
        self._open: set[ClientConnection] = set()

    def __repr__(self) -> str:
        return f"Upstream({self.url}, {len(self._idle)} idle of {len(self._open)})"

    def request_head(self, method: bytes, target: bytes, header_block: bytes, body_bytes: int) -> bytes:
        """A head for this upstream. `header_block`: `encode_headers` of what to forward; `target`: origin form."""
        return encode_request_head(method, self.base_path + target, self.authority, header_block, body_bytes)

    def send(
        self,
        head: bytes,
        body: bytes,
        sink: ResponseSink,
        *,
        decode: bool = False,
        head_request: bool = False,
        fresh: bool = False,
        first_byte_timeout_s: float | None = None,
        idle_timeout_s: float | None = None,
    ) -> Exchange:
        """Send one request; `sink` gets the answer, or one failure. With `fresh`, never over a reused connection.

        Returns at once. The exchange can be cancelled, paused and resumed.
        """
        limits = self.client.limits
        exchange = (DecodingExchange if decode else Exchange)(
            self,
            sink,
            head_request=head_request,
            first_byte_timeout_s=limits.first_byte_timeout_s if first_byte_timeout_s is None else first_byte_timeout_s,
            idle_timeout_s=limits.idle_timeout_s if idle_timeout_s is None else idle_timeout_s,
        )
        self.client.track(exchange)
        connection = None if fresh else self._take_idle()
        if connection is not None:
            connection.run(exchange, (head, body))
        else:
            exchange.attach_connecting(self.client.loop.create_task(self._connect(exchange, (head, body))))
        return exchange

    async def fetch(
        self,
        method: str,
        target: str,
        *,
        headers: Headers | None = None,
        body: bytes = b"",
        timeout_s: float | None = None,
        max_bytes: int = 16 << 20,
    ) -> FetchedResponse:
        """One small request and its whole answer. Sent again once when an idle connection turned out stale and the
        method is idempotent.

        Raises UpstreamError, also when the answer takes longer than `timeout_s` or is larger than `max_bytes`.
        """
        head = self.request_head(
            method.encode(),
            target.encode(),
            encode_headers(headers or []),
            len(body) if body or method == "POST" else -1,
        )
        fresh = False
        while True:
            sink = _Collector(self, max_bytes)
            exchange = self.send(
                head,
                body,
                sink,
                decode=True,
                head_request=method == "HEAD",
                fresh=fresh,
                first_byte_timeout_s=timeout_s,
                idle_timeout_s=timeout_s,
            )
            try:
                return await sink.done
            except UpstreamStaleError:
                if fresh or method not in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE"):
                    raise
                fresh = True
            finally:
                exchange.cancel()

    # --- connections ------------------------------------------------------------------------------------------------

    def _take_idle(self) -> ClientConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _connect(self, exchange: Exchange, request: tuple[bytes, bytes]) -> None:
        timeout_s = self.client.limits.connect_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                transport, connection = await self.client.loop.create_connection(
                    lambda: ClientConnection(self), self.host, self.port, ssl=self._ssl()
                )
        except TimeoutError:
            exchange.fail(UpstreamConnectError(f"no connection to {self.url} within {timeout_s:g} s"))
            return
        except (OSError, UnicodeError) as exc:
            why = getattr(exc, "strerror", None) or exc
            exchange.fail(UpstreamConnectError(f"no connection to {self.url}: {why}"))
            return
        try:
            self._check_peer(transport)
        except PeerError as exc:
            connection.abandon()
            exchange.fail(UpstreamConnectError(f"what answers at {self.url} is not who it should be: {exc}"))
            return
        self._open.add(connection)
        if exchange.done or not connection.usable:
            connection.abandon()
            exchange.fail(UpstreamConnectError(f"{self.url} closed the connection as it was opened"))
            return
        connection.run(exchange, request)

    def _check_peer(self, transport: asyncio.BaseTransport) -> None:
        peers = self.client.peers.get((self.host, self.port))
        if self.tls and peers is not None:
            peers.check(transport.get_extra_info("ssl_object").getpeercert(binary_form=True) or b"")

    def _ssl(self) -> ssl.SSLContext | None:
        if not self.tls:
            return None
        peers = self.client.peers.get((self.host, self.port))
        if peers is not None:
            return peers.context()
        if self.client.ssl_context is None:
            self.client.ssl_context = ssl.create_default_context()
        return self.client.ssl_context

    def give_back(self, connection: ClientConnection) -> None:
        if len(self._idle) >= self.client.limits.pool_connections or self.client._sweep is None:
            connection.abandon()
            return
        connection.idle_since_s = self.client.loop.time()
        self._idle.append(connection)

    def forget(self, connection: ClientConnection) -> None:
        self._open.discard(connection)
        if connection.exchange is None:
            try:
                self._idle.remove(connection)
            except ValueError:
                pass  # it was in use, not idle

    def drop_idle(self, before_s: float) -> None:
        """Close connections idle since before a point in loop time."""
        while self._idle and self._idle[0].idle_since_s < before_s:
            self._idle.popleft().abandon()

    def close(self) -> None:
        self._idle.clear()
        for connection in list(self._open):
            connection.abandon()


class _Collector:
    """A sink that gathers a whole answer."""

    def __init__(self, upstream: Upstream, max_bytes: int) -> None:
        self.done: asyncio.Future[FetchedResponse] = upstream.client.loop.create_future()
        self._upstream = upstream
        self._max_bytes = max_bytes
        self._head: ResponseHead | None = None
        self._parts: list[bytes] = []
        self._bytes = 0

    def on_head(self, head: ResponseHead) -> None:
        self._head = head

    def on_body(self, data: bytes) -> None:
        self._bytes += len(data)
        if self._bytes <= self._max_bytes:
            self._parts.append(data)
        elif not self.done.done():
            message = f"{self._upstream.url} sent more than {self._max_bytes} bytes"
            self.done.set_exception(UpstreamProtocolError(message))

    def on_end(self) -> None:
        if not self.done.done() and self._head is not None:
            self.done.set_result(FetchedResponse(self._head.status, self._head.headers, b"".join(self._parts)))

    def on_failure(self, error: UpstreamError) -> None:
        if not self.done.done():
            self.done.set_exception(error)
