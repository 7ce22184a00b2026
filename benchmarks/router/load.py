"""The load: clients on kept-alive connections, each with one request at a time; checks that every answer is whole."""

from __future__ import annotations

import asyncio
import time
from typing import cast

_PROMPT = "a few words of a prompt " * 8


def request(port: int, *, stream: bool, slow_prefill: bool = False) -> bytes:
    """One completion request as bytes."""
    text = _PROMPT + ("slow-prefill" if slow_prefill else "")
    body = b'{"model":"tiny","prompt":"%b","max_tokens":64,"stream":%b}' % (
        text.encode(),
        b"true" if stream else b"false",
    )
    return (
        b"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%b" % (port, len(body), body)
    )


class _Client(asyncio.Protocol):
    def __init__(self, load: _Load) -> None:
        self.load = load
        self.buffer = b""
        self.transport: asyncio.Transport | None = None
        self.sent_s = 0.0
        self.first_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.next()

    def next(self) -> None:
        assert self.transport is not None
        if self.load.left <= 0:
            self.transport.close()
            return
        self.load.left -= 1
        self.buffer = b""
        self.first_s = 0.0
        self.sent_s = time.perf_counter()
        self.transport.write(self.load.data)

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if not self.first_s and 0 <= self.buffer.find(b"\r\n\r\n") < len(self.buffer) - 4:  # more than the head
            self.first_s = time.perf_counter()
        if self.load.stream:
            whole = self.buffer.endswith(b"0\r\n\r\n")
        else:
            whole = self.buffer.endswith((b'"completion_tokens":30}}', b"0\r\n\r\n"))
        if whole:
            self.finish()

    def finish(self) -> None:
        load = self.load
        events = self.buffer.count(b"data: {")
        if not self.buffer.startswith(b"HTTP/1.1 200") or (load.stream and events != 64):
            load.fail(f"a wrong answer ({events} events): {self.buffer[:300]!r}")
            return
        load.first_byte_s.append(self.first_s - self.sent_s)
        load.done += 1
        if load.done == load.total and not load.finished.done():
            load.finished.set_result(None)
        self.next()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.load.done < self.load.total and self.load.left > 0:
            self.load.fail(f"the connection closed after {self.buffer[:200]!r}: {exc}")


class _Load:
    def __init__(self, data: bytes, total: int, stream: bool) -> None:
        self.data = data
        self.total = self.left = total
        self.stream = stream
        self.done = 0
        self.first_byte_s: list[float] = []
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, message: str) -> None:
        if not self.finished.done():
            self.finished.set_exception(RuntimeError(message))


async def _run(port: int, requests: int, clients: int, stream: bool, slow_prefill: bool) -> tuple[float, list[float]]:
    load = _Load(request(port, stream=stream, slow_prefill=slow_prefill), requests, stream)
    loop = asyncio.get_running_loop()
    start_s = time.perf_counter()
    for _ in range(clients):
        await loop.create_connection(lambda: _Client(load), "127.0.0.1", port)
    async with asyncio.timeout(120):
        await load.finished
    return time.perf_counter() - start_s, load.first_byte_s


def run_load(
    port: int, *, requests: int, clients: int, stream: bool, slow_prefill: bool = False
) -> tuple[float, list[float]]:
    """Returns (seconds taken, seconds to the first body byte of each). Raises RuntimeError on a wrong answer."""
    import uvloop

    return uvloop.run(_run(port, requests, clients, stream, slow_prefill))
