"""Fake prefill and decode workers, as cheap as Python allows, so that a router's own cost shows.

    python -m benchmarks.router.workers PREFILL_PORT DECODE_PORT

Prefill answers a small JSON at once, or after 10 ms for bodies that hold `slow-prefill`. Decode answers 300 bytes of
JSON, or 64 server-sent events in 64 writes. Every GET is answered with 200, so that any router takes them for healthy.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

CHUNKS = 64
SLOW_PREFILL_S = 0.010
_PREFILL_BODY = b'{"id":"p","object":"text_completion","choices":[{"index":0,"text":"","finish_reason":"length"}]}'
_DECODE_BODY = (
    b'{"id":"d","object":"text_completion","created":1,"model":"tiny","choices":[{"index":0,"text":"'
    + b"word " * 30
    + b'","logprobs":null,"finish_reason":"length"}],"usage":{"prompt_tokens":40,"completion_tokens":30}}'
)
_EVENT = b'data: {"id":"d","object":"text_completion","created":1,"choices":[{"index":0,"text":" word"}]}\n\n'
_GET_BODY = (
    b'{"status":"ok","model_path":"tiny","served_model_name":"tiny","is_generation":true,"data":[{"id":"tiny"}],'
    b'"object":"list","internal_states":[]}'
)


def _answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


_GET = _answer(_GET_BODY)
_PREFILL = _answer(_PREFILL_BODY)
_DECODE = _answer(_DECODE_BODY)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_STREAM_CHUNK = b"%x\r\n%b\r\n" % (len(_EVENT), _EVENT)
_STREAM_END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


class Worker(asyncio.Protocol):
    """One connection; requests come one at a time."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.buffer = b""
        self.loop = asyncio.get_running_loop()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if b"transfer-encoding: chunked" in head:
                last = self.buffer.find(b"0\r\n\r\n", end)
                if last < 0:
                    return
                length = last + 5 - end - 4
            if len(self.buffer) < end + 4 + length:
                return
            body = self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        if head.startswith((b"get", b"head")):
            self.send(_GET)
        elif self.role == "prefill":
            if b"slow-prefill" in body:
                self.loop.call_later(SLOW_PREFILL_S, self.send, _PREFILL)
            else:
                self.send(_PREFILL)
        elif b'"stream":true' in body or b'"stream": true' in body:
            self.send(_STREAM_HEAD)
            self.loop.call_soon(self.stream, CHUNKS)
        else:
            self.send(_DECODE)

    def stream(self, left: int) -> None:
        """One chunk per turn of the loop, so that they are separate writes."""
        if left:
            self.send(_STREAM_CHUNK)
            self.loop.call_soon(self.stream, left - 1)
        else:
            self.send(_STREAM_END)

    def send(self, data: bytes) -> None:
        if self.transport is not None:
            self.transport.write(data)


async def main(prefill_port: int, decode_port: int) -> None:
    loop = asyncio.get_running_loop()
    for role, port in (("prefill", prefill_port), ("decode", decode_port)):
        await loop.create_server(lambda role=role: Worker(role), "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
