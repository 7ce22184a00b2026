"""Relaying one request to one upstream: the answer's body passes byte for byte, with backpressure both ways."""

from __future__ import annotations

import asyncio

from sglang_prfaas.http.client import Upstream
from sglang_prfaas.http.errors import HttpError, UpstreamError, UpstreamStaleError
from sglang_prfaas.http.exchange import Exchange
from sglang_prfaas.http.messages import (
    Framing,
    Headers,
    Request,
    ResponseHead,
    encode_headers,
    forwardable_request_headers,
    forwardable_response_headers,
)
from sglang_prfaas.http.response import Response

_IDEMPOTENT = frozenset(("GET", "HEAD", "OPTIONS", "PUT", "DELETE"))


class RelaySink:
    """Writes an upstream's answer to a client's response. `done` resolves at its end, or raises its UpstreamError."""

    __slots__ = ("done", "exchange", "head", "response")

    def __init__(self, response: Response, loop: asyncio.AbstractEventLoop) -> None:
        self.response = response
        self.done: asyncio.Future[None] = loop.create_future()
        self.head: ResponseHead | None = None
        self.exchange: Exchange | None = None

    def on_head(self, head: ResponseHead) -> None:
        self.head = head
        start_response(self.response, head)

    def on_body(self, data: bytes) -> None:
        self.response.write(data)

    def on_end(self) -> None:
        self.response.end()
        if not self.done.done():
            self.done.set_result(None)

    def on_failure(self, error: UpstreamError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


def start_response(response: Response, head: ResponseHead) -> None:
    """Begin an answer with an upstream's status, headers and framing."""
    headers = forwardable_response_headers(head.headers)
    if head.framing is Framing.NONE:
        if head.content_length:  # the answer to HEAD
            headers.append((b"content-length", b"%d" % head.content_length))
        response.start(head.status, headers, Framing.NONE)
    else:
        response.start(head.status, headers, head.framing, content_length=head.content_length, raw=True)


async def relay(
    request: Request,
    response: Response,
    upstream: Upstream,
    *,
    target: bytes | None = None,
    drop_request_headers: tuple[bytes, ...] = (),
    extra_request_headers: Headers | None = None,
) -> None:
    """Send `request` to `upstream` and its answer to the client. Cancelling closes the upstream connection.

    `target` replaces the request's own (origin form, before the upstream's base path); `drop_request_headers` are
    prefixes of header names. An upstream that fails before its head arrived raises HttpError 502 or 504; one that
    fails later cuts the client's connection, so that a broken answer never looks complete. A stale kept-alive
    connection is replaced once for idempotent methods.
    """
    headers = forwardable_request_headers(request.headers, drop_request_headers)
    if extra_request_headers:
        headers.extend(extra_request_headers)
    has_body = bool(request.body) or request.method in ("POST", "PUT", "PATCH")
    head = upstream.request_head(
        request.method.encode("latin-1"),
        request.target if target is None else target,
        encode_headers(headers),
        len(request.body) if has_body else -1,
    )
    fresh = False
    while True:
        sink = RelaySink(response, upstream.client.loop)
        exchange = upstream.send(head, request.body, sink, head_request=request.method == "HEAD", fresh=fresh)
        response.set_flow(exchange.pause, exchange.resume)
        try:
            await sink.done
            return
        except UpstreamStaleError as exc:
            if fresh or request.method not in _IDEMPOTENT:
                raise HttpError(exc.status, str(exc), code=exc.code) from exc
            fresh = True
        except UpstreamError as exc:
            if response.started:
                response.abort()
                return
            raise HttpError(exc.status, str(exc), code=exc.code) from exc
        finally:
            exchange.cancel()
