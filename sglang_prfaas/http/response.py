"""What a handler answers with: one `Response` per request, written to the client's connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sglang_prfaas.errors import LocalError
from sglang_prfaas.http.chunks import LAST_CHUNK, ChunkScanner, encode_chunk
from sglang_prfaas.http.messages import Framing, encode_headers, status_line

if TYPE_CHECKING:
    from sglang_prfaas.http.server_connection import ServerConnection

_JSON = (b"content-type", b"application/json")


class Response:
    """The answer to one request. The head is held until the first body bytes, so both leave in one write.

    Either `send` (a complete answer), or `start`, `write` any number of times, `end`. `abort` cuts the connection, so
    that the client can tell a broken answer from a complete one.
    """

    __slots__ = (
        "_connection",
        "_dechunk",
        "_head",
        "_http_1_1",
        "_keep_alive",
        "_no_body",
        "bytes_written",
        "ended",
        "extra_headers",
        "framing",
        "raw",
        "started",
        "status",
    )

    def __init__(self, connection: ServerConnection, *, head_only: bool, http_1_1: bool, keep_alive: bool) -> None:
        self._connection = connection
        self._head = b""
        self._no_body = head_only
        self._http_1_1 = http_1_1
        self._keep_alive = keep_alive
        self._dechunk: ChunkScanner | None = None
        self.framing = Framing.NONE
        self.raw = False
        self.started = False
        self.ended = False
        self.status = 0
        self.bytes_written = 0
        self.extra_headers: list[tuple[bytes, bytes]] = []

    # --- complete answers -------------------------------------------------------------------------------------------

    def send(self, status: int, body: bytes = b"", headers: Iterable[tuple[bytes, bytes]] = (_JSON,)) -> None:
        """Answer completely. Raises LocalError when an answer was already started."""
        self.start(status, headers, Framing.LENGTH, content_length=len(body))
        if body:
            self.write(body)
        self.end()

    # --- streamed answers -------------------------------------------------------------------------------------------

    def start(
        self,
        status: int,
        headers: Iterable[tuple[bytes, bytes]],
        framing: Framing,
        *,
        content_length: int = 0,
        raw: bool = False,
    ) -> None:
        """Begin an answer. With `raw`, bytes given to `write` under CHUNKED are already chunk-coded.

        Raises LocalError when an answer was already started.
        """
        if self.started:
            raise LocalError("a response was already started on this request")
        self.started = True
        self.status = status
        self.raw = raw
        self.framing = framing
        parts = [status_line(status), encode_headers(headers)]
        if self.extra_headers:
            parts.append(encode_headers(self.extra_headers))
        if framing is Framing.LENGTH:
            parts.append(b"content-length: %d\r\n" % content_length)
        elif framing is Framing.CHUNKED:
            if self._http_1_1:
                parts.append(b"transfer-encoding: chunked\r\n")
            else:  # HTTP/1.0 knows no chunks: the end of the connection marks the end of the body
                self._keep_alive = False
                self._dechunk = ChunkScanner() if raw else None
        elif framing is Framing.CLOSE:
            self._keep_alive = False
        if self._connection.closing_after_response:
            self._keep_alive = False
        if not self._keep_alive:
            parts.append(b"connection: close\r\n")
        elif not self._http_1_1:
            parts.append(b"connection: keep-alive\r\n")
        parts.append(b"\r\n")
        self._head = b"".join(parts)

    def write(self, data: bytes) -> None:
        """Send body bytes (with `raw` and CHUNKED: chunk-coded bytes). Never blocks; see `set_flow` and `drain`."""
        if not data or self.ended:
            return
        if self._no_body:
            return
        if self.framing is Framing.CHUNKED:
            if not self._http_1_1:
                if self._dechunk is not None:
                    data = self._dechunk.feed(data)[0]
            elif not self.raw:
                data = encode_chunk(data)
        if self._head:
            data = self._head + data
            self._head = b""
        self.bytes_written += len(data)
        self._connection.write(data)

    def flush_head(self) -> None:
        """Send the head now, before any body byte is known."""
        if self._head:
            self._connection.write(self._head)
            self._head = b""

    def end(self) -> None:
        """The answer is complete."""
        if self.ended:
            return
        self.ended = True
        tail = self._head
        self._head = b""
        if self.framing is Framing.CHUNKED and not self.raw and self._http_1_1 and not self._no_body:
            tail += LAST_CHUNK
        if tail:
            self._connection.write(tail)
        self._connection.response_done(self._keep_alive)

    def abort(self) -> None:
        """Cut the connection without completing the answer. Nothing more can be written."""
        if not self.ended:
            self.ended = True
            self._connection.abort()

    # --- flow control -----------------------------------------------------------------------------------------------

    def set_flow(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        """Call `pause` when the client's connection has much unsent, `resume` when it has drained."""
        self._connection.set_flow(pause, resume)

    async def drain(self) -> None:
        """Wait until the client's connection takes bytes again. Raises CancelledError when the client is gone."""
        if self._connection.writable:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def resume() -> None:
            if not waiter.done():
                waiter.set_result(None)

        self._connection.set_flow(lambda: None, resume)
        await waiter
