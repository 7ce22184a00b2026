"""Faults: clients that leave, legs that die before and after the first byte, retries, error events in streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest

from sglang_prfaas.config.schema import RouterLimits
from sglang_prfaas.errors import LocalError
from sglang_prfaas.http import Framing, Request, Response, UpstreamConnectError
from sglang_prfaas.router.process import run_router
from sglang_prfaas.site.free_ports import free_ports
from tests.router.pd_fakes import DEADLINE_S, FakeServer, WordCounter, cluster, header, raw_exchange, run, until

Behaviour = Callable[[Request, Response], Coroutine[Any, Any, bool]]


def answering(status: int, body: bytes, *, times: int = 1 << 30) -> Behaviour:
    """Answer the first `times` requests so."""
    left = [times]

    async def behave(request: Request, response: Response) -> bool:
        left[0] -= 1
        if left[0] < 0:
            return False
        response.send(status, body)
        return True

    return behave


async def cutting(request: Request, response: Response) -> bool:
    """Close the connection without an answer."""
    response.abort()
    return True


def post(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


# --- clients that leave ---------------------------------------------------------------------------------------------


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


# --- faults before the first token ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [answering(500, b"{}"), answering(503, b"busy"), cutting])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prefill_that_fails_is_retried_on_another(fault: Behaviour, stream: bool) -> None:
    async def main() -> None:
        async with cluster(prfaas=("p1", "p2")) as c:
            c["p1"].behave = fault
            answer = await c.request(body={"prompt": "a " * 50, "stream": stream})
            assert answer.status == 200
            assert header(answer, "x-prfaas-prefill") == "far/p2"
            assert header(answer, "x-prfaas-route") == "prfaas"
            first, second = c["d"].bodies
            assert first["bootstrap_room"] != second["bootstrap_room"]
            await until(lambda: c["d"].aborted == 1, "the first decode leg aborted")
            assert 'retries_total{leg="prefill"' in (await c.request("/metrics", method="GET")).body.decode()

    run(main)


def test_a_dead_prfaas_prefill_is_retried_at_home() -> None:
    async def main() -> None:
        async with cluster(limits=RouterLimits(health_interval_s=3600, drain_timeout_s=1)) as c:
            await c["p"].stop()  # the router does not know yet
            answer = await c.long()
            assert answer.status == 200
            assert header(answer, "x-prfaas-route") == "local"
            assert "no PrfaaS prefill server is alive" in header(answer, "x-prfaas-reason")
            assert c.down("p")

    run(main)


def test_a_dead_local_prefill_is_retried_remotely() -> None:
    async def main() -> None:
        async with cluster() as c:
            c["l"].behave = answering(500, b"{}")
            answer = await c.short()
            assert answer.status == 200
            assert header(answer, "x-prfaas-route") == "prfaas"
            assert "every local prefill server failed for this request" in header(answer, "x-prfaas-reason")

    run(main)


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"error": {"object": "error", "message": "Decode transfer failed", "code": 500}}\n\n',
        b'data: {"text": "", "meta_info": {"finish_reason": {"type": "abort", "status_code": 500}}}\n\n',
    ],
)
def test_an_error_event_before_the_first_token_is_retried(event: bytes) -> None:
    async def main() -> None:
        async with cluster(prfaas=("p1", "p2")) as c:
            left = [1]

            async def behave(request: Request, response: Response) -> bool:
                left[0] -= 1
                if left[0] < 0:
                    return False
                response.start(200, [(b"content-type", b"text/event-stream")], Framing.CHUNKED)
                response.flush_head()
                await asyncio.sleep(0)
                response.write(event[:20])
                await asyncio.sleep(0)
                response.write(event[20:])
                response.end()
                return True

            c["d"].behave = behave
            answer = await c.request(body={"prompt": "a " * 50, "stream": True})
            assert answer.body == b"".join(c["d"].chunks)
            assert header(answer, "x-prfaas-prefill") == "far/p2"

    run(main)


def test_error_events_to_the_end_become_one_error_answer() -> None:
    async def main() -> None:
        async with cluster() as c:

            async def behave(request: Request, response: Response) -> bool:
                response.start(200, [(b"content-type", b"text/event-stream")], Framing.CHUNKED)
                response.write(b'data: {"error": {"message": "transfer failed", "code": 500}}\n\n')
                response.end()
                return True

            c["d"].behave = behave
            answer = await c.request(body={"prompt": "a", "stream": True})
            assert answer.status == 500
            assert "transfer failed" in json.loads(answer.body)["error"]["message"]
            assert len(c["d"].bodies) == 3  # max_retries is 2
            c["d"].behave = None
            assert (await c.short()).status == 200

    run(main)


def test_a_decode_that_fails_is_retried_on_another() -> None:
    async def main() -> None:
        async with cluster(decode=("d1", "d2")) as c:
            c["d1"].behave = cutting
            answer = await c.short()
            assert answer.status == 200
            assert header(answer, "x-prfaas-decode") == "home/d2"

    run(main)


def test_an_upstreams_own_error_is_passed_on_when_retries_end() -> None:
    async def main() -> None:
        async with cluster() as c:
            c["d"].behave = answering(507, b'{"message": "full"}')
            answer = await c.short()
            assert answer.status == 507
            assert answer.body == b'{"message": "full"}'
            assert header(answer, "x-prfaas-route")

    run(main)


@pytest.mark.parametrize("name", ["d", "l"])
def test_a_4xx_of_either_leg_is_passed_on_and_not_retried(name: str) -> None:
    async def main() -> None:
        async with cluster() as c:
            c[name].behave = answering(400, b'{"object": "error", "message": "too long"}')
            answer = await c.short()
            assert answer.status == 400
            assert answer.body == b'{"object": "error", "message": "too long"}'
            assert len(c["d"].bodies) == 1

    run(main)


def test_a_stale_kept_alive_connection_costs_no_retry() -> None:
    async def main() -> None:
        async with cluster(limits=RouterLimits(health_interval_s=3600, max_retries=0, drain_timeout_s=1)) as c:
            assert (await c.short()).status == 200

            async def drop(request: Request, response: Response) -> bool:
                c["d"].behave = None
                response.abort()
                return True

            c["d"].behave = drop  # as if the idle connection had been closed when the request came
            answer = await c.short()
            assert answer.status == 200
            assert len(c["d"].bodies) == 3

    run(main)


def test_all_prefill_dead_is_503_with_the_last_error() -> None:
    async def main() -> None:
        async with cluster(limits=RouterLimits(health_interval_s=3600, drain_timeout_s=1)) as c:
            await c["p"].stop()
            await c["l"].stop()
            answer = await c.long()
            assert answer.status == 503
            message = json.loads(answer.body)["error"]["message"]
            assert message.startswith("No prefill server of any site is alive. Before that: no connection to")

    run(main)


def test_silence_is_a_504() -> None:
    async def main() -> None:
        limits = RouterLimits(health_interval_s=3600, first_byte_timeout_s=0.3, drain_timeout_s=1)
        async with cluster(limits=limits) as c:
            c["l"].gate = asyncio.Event()
            answer = await c.short()
            assert answer.status == 504
            assert "gave no answer within 0.3 s" in json.loads(answer.body)["error"]["message"]
            await until(lambda: c["l"].aborted == c["d"].aborted == 1, "both legs aborted")

    run(main)


# --- faults after the first byte ------------------------------------------------------------------------------------


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


def test_stopping_finishes_requests_in_work() -> None:
    async def main() -> None:
        async with cluster(limits=RouterLimits(health_interval_s=0.05, drain_timeout_s=DEADLINE_S)) as c:
            c["l"].gate = asyncio.Event()
            waiting = asyncio.create_task(c.short())
            await asyncio.wait_for(c["l"].started.wait(), DEADLINE_S)
            stopping = asyncio.create_task(c.router.stop())
            await asyncio.sleep(0)
            c["l"].gate.set()
            assert (await waiting).status == 200
            await stopping

    run(main)


def test_run_router_listens_until_told_to_stop() -> None:
    async def main() -> None:
        async with cluster() as c:
            config = msgspec.structs.replace(
                c.router.config, router=msgspec.structs.replace(c.router.config.router, port=free_ports(1)[0])
            )
            stop = asyncio.Event()
            ports: list[int] = []
            running = asyncio.create_task(run_router(config, stop=stop, ready=ports.append, counter=WordCounter()))
            await until(lambda: bool(ports), "ready was called")
            upstream = c.client.upstream(f"http://127.0.0.1:{ports[0]}")
            for _ in range(200):
                if (await upstream.fetch("GET", "/health")).status == 200:
                    break
                await asyncio.sleep(0.02)
            assert (await upstream.fetch("POST", "/generate", body=b'{"text": "a"}')).status == 200
            stop.set()
            await asyncio.wait_for(running, DEADLINE_S)
            with pytest.raises(UpstreamConnectError):
                await upstream.fetch("GET", "/health")

    run(main)


def test_a_taken_port_is_a_clear_error() -> None:
    async def main() -> None:
        async with cluster() as c:
            config = msgspec.structs.replace(
                c.router.config, router=msgspec.structs.replace(c.router.config.router, port=c.port)
            )
            with pytest.raises(LocalError, match=f"cannot listen on 127.0.0.1:{c.port}"):
                await run_router(config, stop=asyncio.Event(), counter=WordCounter())

    run(main)
