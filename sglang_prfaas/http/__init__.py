"""HTTP/1.1 on httptools and asyncio protocols: a server, a pooled client, and a relay between them.

    server = HttpServer(handler, ServerLimits(max_body_bytes=...))      # async def handler(request, response)
    port = await server.start(host, 0, ssl_context=None)                # or peers=TlsPeers: mutual TLS
    client = Client(ClientLimits(connect_timeout_s=...))
    upstream = client.upstream("http://127.0.0.1:30000")                # a path in the URL prefixes every target

    async def handler(request: Request, response: Response) -> None:
        if request.path == "/site":
            response.send(200, b"{}")                                   # a complete JSON answer
        else:
            await relay(request, response, upstream, target=b"/health") # streams both ways, byte for byte
        # or: raise HttpError(404, "no such server", code="not_found")  # OpenAI error shape

    answer = await upstream.fetch("GET", "/health", timeout_s=5)        # FetchedResponse(status, headers, body)
    await server.drain(timeout_s=30); await client.close()

A client that closes its connection cancels its handler; a cancelled `relay` closes the upstream connection, which makes
SGLang abort the request. Request bodies are read whole (limit `max_body_bytes`) before the handler runs.
"""

from sglang_prfaas.http.client import Client, ClientLimits, FetchedResponse, Upstream
from sglang_prfaas.http.errors import (
    HttpError,
    UpstreamClosedError,
    UpstreamConnectError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamStaleError,
    UpstreamTimeoutError,
    error_body,
)
from sglang_prfaas.http.exchange import Exchange, ResponseSink
from sglang_prfaas.http.messages import Framing, Headers, Request, ResponseHead
from sglang_prfaas.http.peers import TlsPeers
from sglang_prfaas.http.relay import RelaySink, relay
from sglang_prfaas.http.response import Response
from sglang_prfaas.http.server import HttpServer, ServerLimits

__all__ = [
    "Client",
    "ClientLimits",
    "Exchange",
    "FetchedResponse",
    "Framing",
    "Headers",
    "HttpError",
    "HttpServer",
    "RelaySink",
    "Request",
    "Response",
    "ResponseHead",
    "ResponseSink",
    "ServerLimits",
    "TlsPeers",
    "Upstream",
    "UpstreamClosedError",
    "UpstreamConnectError",
    "UpstreamError",
    "UpstreamProtocolError",
    "UpstreamStaleError",
    "UpstreamTimeoutError",
    "error_body",
    "relay",
]
