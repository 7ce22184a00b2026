"""Clients that leave or are slow, and legs that break after the first byte."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sglang_prfaas.http import Framing, Request, Response
from tests.router.pd_fakes import DEADLINE_S, FakeServer, cluster, raw_exchange, run, until


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_waiting_aborts_both_legs(stream: bool) -> None:
    async def main() -> None:
        async with cluster() as c:
            c["p"].gate = asyncio.Event()  # prefill hangs, decode waits for it
            _, writer = await asyncio.open_connection("127.0.0.1", c.port)
            writer.write(post({"prompt": "a " * 50, "stream": stream}))
            await asyncio.wait_for(asyncio.gather(c["p"].started.wait(), c["d"].started.wait()), DEADLINE_S)
            writer.close()
            await until(lambda: c["p"].aborted == c["d"].aborted == 1, "both legs aborted")
            await until(
                lambda: all(t.inflight_requests == t.inflight_tokens == 0 for t in c.router.registry.targets()),
                "loads given back",
            )
            assert 'aborts_total{phase="waiting"} 1' in (await c.request("/metrics", method="GET")).body.decode()
            assert (await c.short()).status == 200

    run(main)


def test_a_client_that_leaves_in_mid_stream_aborts_decode() -> None:
    async def main() -> None:
        async with cluster() as c:

            async def behave(request: Request, response: Response) -> bool:
                response.start(200, [(b"content-type", b"text/event-stream")], Framing.CHUNKED)
                response.write(b"data: 1\n\n")
                await asyncio.Event().wait()
                return True

            c["d"].behave = behave
            reader, writer = await asyncio.open_connection("127.0.0.1", c.port)
            writer.write(post({"prompt": "a", "stream": True}))
            assert b"data: 1" in await asyncio.wait_for(reader.readuntil(b"data: 1\n\n"), DEADLINE_S)
            writer.close()
            await until(lambda: c["d"].aborted == 1, "decode aborted")

    run(main)


@pytest.mark.parametrize("partial", [b"", b"1", b"20\r\ndata: half a chunk"])
def test_a_stream_that_breaks_ends_with_an_error_event(partial: bytes) -> None:
    async def main() -> None:
        async with cluster() as c:

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                request = await reader.readuntil(b"\r\n\r\n")
                if b"GET" in request:
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                else:
                    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
                    writer.write(head + b"9\r\ndata: 1\n\n\r\n" + partial)
                await writer.drain()
                writer.close()

            await c["d"].stop()
            raw = await asyncio.start_server(serve, "127.0.0.1", c["d"].port)
            async with raw:
                await c.all_up()
                answer = await c.request(body={"prompt": "a", "stream": True})
                assert answer.status == 200
                first, error = answer.body.strip().split(b"\n\n")
                assert first == b"data: 1"
                error_text = json.loads(error.removeprefix(b"data: "))["error"]
                assert error_text["type"] == "upstream_error"
                assert "closed the connection in mid-answer" in error_text["message"]
                text = (await c.request("/metrics", method="GET")).body.decode()
                assert 'broken_streams_total{cause="decode"} 1' in text

    run(main)


def test_a_whole_answer_that_breaks_off_cuts_the_connection() -> None:
    async def main() -> None:
        async with cluster() as c:

            async def behave(request: Request, response: Response) -> bool:
                response.start(200, [(b"content-type", b"application/json")], Framing.LENGTH, content_length=100)
                response.write(b'{"half":')
                await asyncio.sleep(0.01)
                response.abort()
                return True

            c["d"].behave = behave
            answer = await raw_exchange(c.port, post({"prompt": "a"}))
            assert b"content-length: 100" in answer
            assert answer.endswith(b'{"half":')

    run(main)


def test_prefill_does_not_matter_once_decode_answers() -> None:
    async def main() -> None:
        async with cluster() as c:
            gate = asyncio.Event()

            async def prefill(request: Request, response: Response) -> bool:
                server: FakeServer = c["l"]
                server.room(server.bodies[-1]["bootstrap_room"]).done.set()
                await gate.wait()
                response.abort()
                return True

            c["l"].behave = prefill
            answer = await c.short()
            assert answer.status == 200
            gate.set()
            await until(
                lambda: all(t.inflight_tokens == 0 for t in c.router.registry.targets()), "prefill's load given back"
            )

    run(main)


def test_a_slow_client_slows_decode_down() -> None:
    async def main() -> None:
        async with cluster() as c:
            sent = [0]

            async def behave(request: Request, response: Response) -> bool:
                response.start(200, [(b"content-type", b"text/event-stream")], Framing.CHUNKED)
                for _ in range(400):
                    response.write(b"data: " + b"x" * 65536 + b"\n\n")
                    sent[0] += 1
                    await response.drain()
                response.end()
                return True

            c["d"].behave = behave
            reader, writer = await asyncio.open_connection("127.0.0.1", c.port, limit=1 << 16)
            writer.write(post({"prompt": "a", "stream": True}))
            await reader.readuntil(b"\r\n\r\n")
            before = -1
            while before != sent[0]:  # until nothing moves any more
                before = sent[0]
                await asyncio.sleep(0.3)
            assert before < 400
            total = 0
            while b"0\r\n\r\n" not in (data := await asyncio.wait_for(reader.read(1 << 20), DEADLINE_S))[-5:]:
                total += len(data)
            assert total + len(data) > 400 * 65536
            writer.close()

    run(main)
