"""An exchange: one request to an upstream server and its answer, fed with the bytes of a connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import httptools

from sglang_prfaas.http.errors import (
    UpstreamClosedError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamStaleError,
    UpstreamTimeoutError,
)
from sglang_prfaas.http.messages import Framing, Headers, ResponseHead

if TYPE_CHECKING:
    from sglang_prfaas.http.client import Upstream
    from sglang_prfaas.http.client_connection import ClientConnection

_MAX_HEAD_BYTES = 256 << 10


class ResponseSink(Protocol):
    """Takes an answer as it arrives. Exactly one of `on_end` and `on_failure` ends it; none follows a cancel."""

    def on_head(self, head: ResponseHead) -> None:
        """The status and headers."""

    def on_body(self, data: bytes) -> None:
        """Body bytes: as on the wire (chunk-coded where the head says so), or the payload when decoding."""

    def on_end(self) -> None:
        """The answer is complete."""

    def on_failure(self, error: UpstreamError) -> None:
        """No complete answer will come."""


class _NoSink:
    """Takes nothing: for exchanges that are over."""

    def on_head(self, head: ResponseHead) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_end(self) -> None: ...

    def on_failure(self, error: UpstreamError) -> None: ...


_NO_SINK = _NoSink()


class Exchange:
    """One request on its way to an upstream and back. Parser callbacks for the raw flavour: chunks are only counted."""

    __slots__ = (
        "_awaits_first_body_byte",
        "_connecting",
        "_connection",
        "_done",
        "_head_buffer",
        "_head_reported",
        "_headers",
        "_keep_alive",
        "_left",
        "_message_complete",
        "_parser",
        "_paused",
        "_status",
        "_surplus",
        "at_chunk_boundary",
        "deadline_s",
        "first_byte_timeout_s",
        "head",
        "head_request",
        "idle_timeout_s",
        "reused",
        "sink",
        "upstream",
    )

    def __init__(
        self,
        upstream: Upstream,
        sink: ResponseSink,
        *,
        head_request: bool,
        first_byte_timeout_s: float,
        idle_timeout_s: float,
    ) -> None:
        self.upstream = upstream
        self.sink = sink
        self.head_request = head_request
        self.first_byte_timeout_s = first_byte_timeout_s
        self.idle_timeout_s = idle_timeout_s
        self.deadline_s = 0.0
        self.head: ResponseHead | None = None
        self.reused = False
        self.at_chunk_boundary = True
        self._connection: ClientConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._done = False
        self._awaits_first_body_byte = True  # a head that comes early does not end first_byte_timeout_s
        self._paused = False
        self._parser: Any = httptools.HttpResponseParser(self)
        self._head_buffer = b""  # bytes up to the end of the head, until it is reported
        self._head_reported = False
        self._headers: Headers = []
        self._status = 0
        self._left = 0
        self._keep_alive = False
        self._surplus = False
        self._message_complete = False

    # --- for users --------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return self._done

    def cancel(self) -> None:
        """Stop: closes the upstream connection unless the answer is complete. SGLang aborts a request whose client is
        gone. No callback of the sink follows."""
        if self._done:
            return
        self._settle()
        if self._connecting is not None:
            self._connecting.cancel()
        if self._connection is not None:
            self._connection.abandon()

    def pause(self) -> None:
        """Take no more bytes from the upstream for now."""
        self._paused = True
        if self._connection is not None:
            self._connection.pause_reading()

    def resume(self) -> None:
        """Take bytes again; the idle timeout starts anew."""
        self._paused = False
        if not self._awaits_first_body_byte:
            self.deadline_s = self.upstream.client.loop.time() + self.idle_timeout_s
        if self._connection is not None:
            self._connection.resume_reading()

    # --- for the client and its connections -------------------------------------------------------------------------

    def attach(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._connecting = None
        self.deadline_s = self.upstream.client.loop.time() + self.first_byte_timeout_s

    def attach_connecting(self, task: asyncio.Task[None]) -> None:
        self._connecting = task

    def check_deadline(self, now_s: float) -> None:
        """Fail when the upstream was silent for too long. A reader that paused it is not its fault."""
        if self._connection is None or self._paused or now_s < self.deadline_s:
            return
        if self._awaits_first_body_byte:
            message = f"{self.upstream.url} gave no answer within {self.first_byte_timeout_s:g} s"
        else:
            message = f"{self.upstream.url} sent nothing for {self.idle_timeout_s:g} s in mid-answer"
        connection = self._connection
        self.fail(UpstreamTimeoutError(message))
        connection.abandon()

    def fail(self, error: UpstreamError) -> None:
        if not self._done:
            self._settle().on_failure(error)

    def feed(self, data: bytes) -> None:
        """Bytes from the connection."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._broken(f"{self.upstream.url} sent bytes that are not an HTTP/1.1 answer: {exc}")
            return
        if self._surplus:
            self._broken(f"{self.upstream.url} sent bytes after the end of its answer")
            return
        if self.head is None:
            self._head_buffer += data
            if len(self._head_buffer) > _MAX_HEAD_BYTES:
                self._broken(f"{self.upstream.url} sent a head above {_MAX_HEAD_BYTES} bytes")
            return
        if not self._head_reported:
            data = self._end_of_head(data)
            if self._done:
                return
        if data or not self._awaits_first_body_byte:
            self._awaits_first_body_byte = False
            self.deadline_s = self.upstream.client.loop.time() + self.idle_timeout_s
        self._take_body(data)
        if self._message_complete and not self._done:
            self._finish(keep_alive=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """The transport is gone."""
        self._connection = None
        if self._done:
            return
        why = f": {exc}" if exc else ""
        if self.head is None and not self._head_buffer:
            if self.reused:
                self.fail(UpstreamStaleError(f"{self.upstream.url} closed an idle connection as a request was sent"))
            else:
                self.fail(UpstreamClosedError(f"{self.upstream.url} closed the connection without an answer{why}"))
        elif self.head is not None and self.head.framing is Framing.CLOSE and exc is None:
            self._finish(keep_alive=False)
        else:
            self.fail(UpstreamClosedError(f"{self.upstream.url} closed the connection in mid-answer{why}"))

    # --- parser callbacks -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._message_complete:
            self._surplus = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self._status = status = self._parser.get_status_code()
        if status < 200:
            return
        framing, length = _framing(status, self._headers, self.head_request)
        self.head = ResponseHead(status, self._headers, framing, length)
        self._left = length

    def on_chunk_header(self) -> None:
        self.at_chunk_boundary = False

    def on_chunk_complete(self) -> None:
        self.at_chunk_boundary = True

    def on_message_complete(self) -> None:
        if self._status < 200:  # an interim answer (100, 103): the real one follows
            self._headers = []
        else:
            self._message_complete = True
            self._keep_alive = self._parser.should_keep_alive()

    # --- inner ------------------------------------------------------------------------------------------------------

    def _end_of_head(self, data: bytes) -> bytes:
        """Report the head; returns the body bytes that came with it."""
        assert self.head is not None
        buffer = self._head_buffer + data
        self._head_buffer = b""
        self._head_reported = True
        while True:
            end = buffer.find(b"\r\n\r\n")
            interim = buffer.startswith(b"1", 9)
            buffer = buffer[end + 4 :]
            if not interim:
                break
        self.sink.on_head(self.head)
        return buffer

    def _take_body(self, data: bytes) -> None:
        head = self.head
        assert head is not None
        if head.framing is Framing.LENGTH:
            if len(data) > self._left:
                self._broken(f"{self.upstream.url} sent more than the {head.content_length} bytes it announced")
                return
            self._left -= len(data)
        elif head.framing is Framing.NONE:
            if data:
                self._broken(f"{self.upstream.url} sent a body where none may be")
            else:
                self._message_complete = True
            return
        if data:
            self.sink.on_body(data)

    def _finish(self, *, keep_alive: bool) -> None:
        sink = self._settle()
        connection = self._connection
        self._connection = None
        if connection is not None:
            if keep_alive and not self._paused and self._keep_alive:
                connection.release()
            else:
                connection.abandon()
        self._parser = None  # it refers back to this exchange
        sink.on_end()

    def _settle(self) -> ResponseSink:
        """No more callbacks: returns the sink for the last one, and lets go of it (it refers back to this exchange)."""
        sink = self.sink
        self._done = True
        self.sink = _NO_SINK
        self.upstream.client.forget(self)
        return sink

    def _broken(self, message: str) -> None:
        connection = self._connection
        self.fail(UpstreamProtocolError(message))
        if connection is not None:
            connection.abandon()


class DecodingExchange(Exchange):
    """An exchange whose sink gets the payload without transfer coding."""

    __slots__ = ()

    def on_body(self, data: bytes) -> None:
        if not self._done:
            if not self._head_reported:
                self._end_of_head(data)
            self._awaits_first_body_byte = False
            self.sink.on_body(data)

    def _end_of_head(self, data: bytes) -> bytes:
        if not self._head_reported:
            assert self.head is not None
            self._head_reported = True
            self.sink.on_head(self.head)
        return b""

    def _take_body(self, data: bytes) -> None:
        assert self.head is not None
        if self.head.framing is Framing.NONE:
            self._message_complete = True


def _framing(status: int, headers: Headers, head_request: bool) -> tuple[Framing, int]:
    length: int | None = None
    chunked = False
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            chunked = value.strip().lower() == b"chunked"
    if head_request or status in (204, 304):
        return Framing.NONE, length or 0
    if chunked:
        return Framing.CHUNKED, 0
    if length is not None:
        return Framing.LENGTH, length
    return Framing.CLOSE, 0
