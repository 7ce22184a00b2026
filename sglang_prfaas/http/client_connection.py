"""One connection to an upstream server; exchanges run over it one by one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from sglang_prfaas.http.exchange import Exchange

if TYPE_CHECKING:
    from sglang_prfaas.http.client import Upstream

_WRITE_HIGH_BYTES = 1 << 20


class ClientConnection(asyncio.Protocol):
    """A transport to an upstream. Holds one exchange at a time, or waits idle in the pool."""

    __slots__ = ("_abandoned", "exchange", "idle_since_s", "transport", "upstream", "used")

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.transport: asyncio.Transport | None = None
        self.exchange: Exchange | None = None
        self.idle_since_s = 0.0
        self.used = False
        self._abandoned = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self.transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)

    def run(self, exchange: Exchange, request: tuple[bytes, bytes]) -> None:
        """Send a request (head, body) and feed the answer to its exchange."""
        assert self.transport is not None
        self.exchange = exchange
        exchange.reused = self.used
        self.used = True
        exchange.attach(self)
        head, body = request
        if len(body) < 1 << 16:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    @property
    def usable(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.feed(data)
        elif not self._abandoned:  # bytes that nobody asked for
            self.abandon()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.upstream.forget(self)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.connection_lost(exc)

    def release(self) -> None:
        """The answer is complete: back to the pool."""
        self.exchange = None
        if self.usable:
            self.upstream.give_back(self)

    def abandon(self) -> None:
        """Close at once, without telling the exchange."""
        self._abandoned = True
        self.exchange = None
        if self.transport is not None:
            self.transport.abort()

    def pause_reading(self) -> None:
        if self.usable:
            assert self.transport is not None
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.usable:
            assert self.transport is not None
            self.transport.resume_reading()
