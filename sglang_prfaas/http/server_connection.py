"""One client connection: bytes in, requests out, one response at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

import httptools

from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import PeerError
from sglang_prfaas.http.errors import HttpError
from sglang_prfaas.http.messages import Headers, Request, strip_authority
from sglang_prfaas.http.response import Response

if TYPE_CHECKING:
    from sglang_prfaas.http.server import HttpServer

Handler = Callable[[Request, Response], Awaitable[None]]

_MAX_HEADERS = 200
_LINGER_S = 2.0
_SLOWEST_BYTES_PER_S = 1024.0
_WRITE_HIGH_BYTES = 256 << 10

log = logging.getLogger(__name__)


class ServerConnection(asyncio.Protocol):
    """Parses requests with httptools and runs the handler for one after the other; pipelined ones wait.

    A client that closes its connection cancels the handler that works for it.
    """

    __slots__ = (
        "_body",
        "_body_bytes",
        "_body_since_s",
        "_discarding",
        "_error",
        "_flow",
        "_head_bytes",
        "_headers",
        "_in_head",
        "_parser",
        "_pending",
        "_reading_paused",
        "_request",
        "_server",
        "_task",
        "_transport",
        "_url",
        "certificate",
        "closing_after_response",
        "deadline_s",
        "peer",
        "writable",
    )

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._parser: Any = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None
        self._pending: deque[Request] = deque()
        self._flow: tuple[Callable[[], None], Callable[[], None]] | None = None
        self._error: HttpError | None = None
        self._discarding = False
        self._reading_paused = False
        self._in_head = True
        self._head_bytes = 0
        self._url = b""
        self._headers: Headers = []
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._body_since_s = 0.0
        self.closing_after_response = False
        self.writable = True
        self.peer = ""
        self.certificate = b""
        """What the client has shown (DER), empty without."""
        self.deadline_s: float | None = None

    # --- transport callbacks ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it
        self._transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        peer = transport.get_extra_info("peername")
        self.peer = authority(*peer[:2]) if isinstance(peer, tuple) and len(peer) >= 2 else ""
        session = transport.get_extra_info("ssl_object")
        if session is not None:
            self.certificate = session.getpeercert(binary_form=True) or b""
        try:
            self._server.check_peer(self)
        except PeerError as exc:
            self.refuse_peer(exc)
            return
        if not self._server.admit(self):
            self._refuse(HttpError(503, "The server holds its maximum number of connections.", code="too_busy"))
            return
        self._await_request()

    def refuse_peer(self, why: PeerError) -> None:
        """Cut the connection, whatever it has in work."""
        log.warning("HTTP connection from %s refused: %s", self.peer, why)
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            return
        if self._in_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._refuse(self._error or HttpError(400, f"The request is not valid HTTP/1.1: {exc}"))
            return
        if self._error is not None:
            self._refuse(self._error)
        elif not self._in_head:
            if self.deadline_s is not None:  # a slow but moving upload is not idle
                self._await_body()
        elif self._in_head and self._head_bytes > self._server.limits.max_header_bytes:
            self._refuse(self._head_too_large())

    def eof_received(self) -> bool:
        return False  # a client that ends its side is gone: the transport closes

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.forget(self)
        self._transport = None
        self._pending.clear()
        self.deadline_s = None
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self.writable = False
        if self._flow is not None:
            self._flow[0]()

    def resume_writing(self) -> None:
        self.writable = True
        if self._flow is not None:
            self._flow[1]()

    # --- parser callbacks -------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers = []
        self._body = []
        self._body_bytes = 0
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.rstrip(b" \t")))
        if len(self._headers) > _MAX_HEADERS:
            self._error = self._head_too_large()

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        self._body_since_s = self._server.loop.time()
        limits = self._server.limits
        hosts = expect = 0
        head_bytes = len(self._url)
        for name, value in self._headers:
            head_bytes += len(name) + len(value) + 4
            if name == b"host":
                hosts += 1
            elif name == b"content-length":
                if int(value) > limits.max_body_bytes:
                    self._error = self._body_too_large(int(value))
            elif name == b"transfer-encoding":
                # A proxy in front may have read another coding, or an HTTP/1.0 message, differently: refuse.
                if value.strip().lower() != b"chunked" or self._parser.get_http_version() != "1.1":
                    self._error = HttpError(400, "Only Transfer-Encoding: chunked on HTTP/1.1 is accepted.")
            elif name == b"expect":
                expect = 1
        if head_bytes > limits.max_header_bytes:
            self._error = self._head_too_large()
        if self._parser.should_upgrade():
            self._error = HttpError(400, "Protocol upgrades are not supported; send plain HTTP/1.1.")
        if hosts > 1 or (hosts == 0 and self._parser.get_http_version() == "1.1"):
            self._error = HttpError(400, f"A request needs exactly one Host header, got {hosts}.")
        if expect and self._error is None and self._task is None and not self._pending:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body_bytes += len(data)
        if self._body_bytes > self._server.limits.max_body_bytes:
            self._body.clear()
            if self._error is None:
                self._error = self._body_too_large(self._body_bytes)
        elif self._error is None:
            self._body.append(data)

    def on_message_complete(self) -> None:
        self._in_head = True
        if self._error is not None or self._discarding:
            return
        parser = self._parser
        body = self._body
        request = Request(
            parser.get_method().decode("latin-1"),
            strip_authority(self._url),
            self._headers,
            body[0] if len(body) == 1 else b"".join(body),
            http_1_1=parser.get_http_version() == "1.1",
            keep_alive=parser.should_keep_alive(),
            peer=self.peer,
        )
        self._body = []
        if self._task is None:
            self._start(request)
        else:
            self._pending.append(request)
            self._pause_reading()

    # --- requests and responses -------------------------------------------------------------------------------------

    def _start(self, request: Request) -> None:
        self.deadline_s = None
        response = Response(
            self,
            head_only=request.method == "HEAD",
            http_1_1=request.http_1_1,
            keep_alive=request.keep_alive,
        )
        self._task = self._server.loop.create_task(self._run(request, response))

    async def _run(self, request: Request, response: Response) -> None:
        try:
            await self._server.handler(request, response)
            if not response.ended:
                log.error("handler of %s %s returned without completing its answer", request.method, request.path)
                self._fail(response, HttpError(500, "The server gave no answer."))
        except asyncio.CancelledError:
            response.abort()
            raise
        except HttpError as exc:
            self._fail(response, exc)
        except Exception:
            log.exception("handler of %s %s failed", request.method, request.path)
            self._fail(response, HttpError(500, "Internal error of the router."))
        finally:
            self._task = None
            self._flow = None
            self._next()

    def _fail(self, response: Response, error: HttpError) -> None:
        if response.started:
            response.abort()
        else:
            response.send(error.status, error.body(), ((b"content-type", b"application/json"), *error.headers))

    def _next(self) -> None:
        if self._transport is None or self._transport.is_closing() or self._discarding:
            return
        if self._pending and not self.closing_after_response:
            self._start(self._pending.popleft())
        elif self.closing_after_response:
            self.close()
        else:
            self._await_request()
        if not self._pending:
            self._resume_reading()

    def _await_request(self) -> None:
        self.deadline_s = self._server.loop.time() + self._server.limits.keepalive_timeout_s

    def _await_body(self) -> None:
        """More of it within keepalive_timeout_s, and all of it, that time aside, at no less than the slowest rate."""
        timeout_s, now_s = self._server.limits.keepalive_timeout_s, self._server.loop.time()
        earned_s = self._body_bytes / _SLOWEST_BYTES_PER_S
        self.deadline_s = min(now_s, self._body_since_s + earned_s) + timeout_s

    def deadline_passed(self) -> None:
        """Close what was idle; tell a client whose request is still on its way."""
        if self._in_head and self._head_bytes == 0:
            self.close()
        else:
            self._refuse(HttpError(408, "The request did not arrive in time; send it faster.", code="request_timeout"))

    def response_done(self, keep_alive: bool) -> None:
        """The current response is complete; the handler may still be at work on nothing that the client sees."""
        if not keep_alive:
            self.closing_after_response = True

    # --- transport --------------------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def set_flow(self, pause: Callable[[], None], resume: Callable[[], None]) -> None:
        self._flow = (pause, resume)
        if not self.writable:
            pause()

    def close(self) -> None:
        """Close once what was written is sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once, so that the client sees a broken answer."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def idle(self) -> bool:
        return self._task is None and not self._pending

    @property
    def task(self) -> asyncio.Task[None] | None:
        return self._task

    def _pause_reading(self) -> None:
        if not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._reading_paused and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()

    def _refuse(self, error: HttpError) -> None:
        """Answer with an error and close, reading on for a while: a close with unread bytes would lose the answer."""
        self._discarding = True
        self._body.clear()
        if self._transport is None:
            return
        if self._task is not None:  # an earlier request is still being answered: only cut
            self._transport.close()
            return
        response = Response(self, head_only=False, http_1_1=True, keep_alive=False)
        response.send(error.status, error.body())
        self._server.count_refused(error)
        if self._transport.can_write_eof():
            self._transport.write_eof()
            self._server.loop.call_later(_LINGER_S, self.close)
        else:
            self._transport.close()

    def _body_too_large(self, size: int) -> HttpError:
        limit = self._server.limits.max_body_bytes
        return HttpError(413, f"The request body has {size} bytes or more; at most {limit} are accepted.")

    def _head_too_large(self) -> HttpError:
        limit = self._server.limits.max_header_bytes
        return HttpError(431, f"The request head is too large; at most {limit} bytes in {_MAX_HEADERS} headers.")
