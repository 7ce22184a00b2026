"""Legs that fail before the first token: tried again elsewhere, or passed on when retries end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from sglang_prfaas.config.schema import RouterLimits
from sglang_prfaas.http import Framing, Request, Response
from tests.router.pd_fakes import cluster, header, run, until

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
