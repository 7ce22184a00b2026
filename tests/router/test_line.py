"""Requests that the live router holds back until a prefill server has room, with real sockets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from tests.router.pd_fakes import Cluster, cluster, header, run, until
from tests.router.test_live_policy import Reports, get, live

ONE_AT_A_TIME: dict[str, Any] = {"feed_s": 0.0, "feed_tokens": 0, "slo_ttft_s": 1000.0}


def ask(c: Cluster, words: int, route: str | None = "local") -> asyncio.Task[Any]:
    headers = {"x_prfaas_route": route} if route is not None else {}
    return asyncio.create_task(c.request(body={"model": "tiny", "prompt": "a " * words}, **headers))


def waiting(c: Cluster) -> int:
    line = c.router.policy.line
    assert line is not None
    return len(line)


def prompts(c: Cluster, name: str) -> list[int]:
    return [len(body["prompt"].split()) for body in c[name].bodies]


def test_a_server_has_one_request_and_the_next_waits_in_the_router(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, **ONE_AT_A_TIME) as c:
            c["l"].gate = asyncio.Event()
            first = ask(c, 20)
            await until(lambda: len(c["l"].bodies) == 1, "the first is in prefill")
            second = ask(c, 21)
            await until(lambda: waiting(c) == 1, "the second waits")
            line = (await get(c, "/policy"))["order"]["home"]
            assert (line["local"]["requests"], line["prfaas"]["requests"]) == (1, 0)
            assert line["objective_s"] == 1000.0
            metrics = (await c.request("/metrics", method="GET")).body.decode()
            assert 'prfaas_router_held_requests{site="home",route="local"} 1' in metrics
            assert len(c["l"].bodies) == len(c["d"].bodies) == 1
            c["l"].gate.set()
            one, two = await first, await second
            assert (one.status, two.status) == (200, 200)
            assert float(header(one, "x-prfaas-held-ms")) == 0.0
            assert float(header(two, "x-prfaas-held-ms")) > 0.0
            assert header(two, "x-prfaas-reason").startswith("forced by header")
            newest = (await get(c, "/decisions?newest=1"))["decisions"][0]
            assert newest["held_s"] > 0.0
            await until(lambda: all(len(t.queue) == 0 for t in c.router.registry.targets()), "nothing is left behind")

    run(main)


def test_short_ones_pass_one_that_cannot_be_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, **{**ONE_AT_A_TIME, "slo_ttft_s": 4.0}) as c:
            c["l"].gate = asyncio.Event()
            tasks = [ask(c, 30)]
            await until(lambda: len(c["l"].bodies) == 1, "a request is in prefill")
            for count, words in enumerate((200, 21, 22), 1):
                tasks.append(ask(c, words))
                await until(lambda expected=count: waiting(c) == expected, "it waits")  # type: ignore[misc]
            c["l"].gate.set()
            assert {answer.status for answer in await asyncio.gather(*tasks)} == {200}
            assert prompts(c, "l") == [30, 21, 22, 200]

    run(main)


def test_a_client_that_goes_away_leaves_the_line(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, **ONE_AT_A_TIME) as c:
            c["l"].gate = asyncio.Event()
            first = ask(c, 20)
            await until(lambda: len(c["l"].bodies) == 1, "the first is in prefill")
            gone, stays = ask(c, 21), ask(c, 22)
            await until(lambda: waiting(c) == 2, "two wait")
            gone.cancel()
            await until(lambda: waiting(c) == 1, "one is gone")
            c["l"].gate.set()
            assert (await first).status == (await stays).status == 200
            assert prompts(c, "l") == [20, 22]
            await until(lambda: all(len(t.queue) == 0 for t in c.router.registry.targets()), "nothing is left behind")

    run(main)


def test_beyond_its_limit_the_line_refuses(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, **ONE_AT_A_TIME, max_held_requests=1) as c:
            c["l"].gate = asyncio.Event()
            first = ask(c, 20)
            await until(lambda: len(c["l"].bodies) == 1, "the first is in prefill")
            second = ask(c, 21)
            await until(lambda: waiting(c) == 1, "the second waits")
            refused = await ask(c, 22)
            assert refused.status == 429
            assert int(header(refused, "retry-after")) >= 1
            error = json.loads(refused.body)["error"]
            assert (error["code"], "policy.max_held_requests" in error["message"]) == ("busy_prefill", True)
            c["l"].gate.set()
            assert (await first).status == (await second).status == 200

    run(main)


def test_who_was_held_for_the_longest_time_allowed_goes_to_a_busy_server(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, **ONE_AT_A_TIME, max_held_s=0.3) as c:
            c["l"].gate = asyncio.Event()
            tasks = [ask(c, 20), ask(c, 21)]
            await until(lambda: len(c["l"].bodies) == 2, "both are in prefill")
            c["l"].gate.set()
            answers = await asyncio.gather(*tasks)
            assert float(header(answers[1], "x-prfaas-held-ms")) >= 300.0

    run(main)


def test_an_idle_path_helps_the_other_unless_the_link_is_full(tmp_path: Path) -> None:
    async def main() -> None:
        reports = Reports()
        async with live(tmp_path, reports, **ONE_AT_A_TIME) as c:
            reports.carries(125e6, backlog_bytes=int(3000 * 125e6))
            await until(lambda: c.router.policy.describe(c.router.client.loop.time())["links"][0]["wait_s"] > 1, "")
            c["l"].gate = asyncio.Event()
            first = ask(c, 20)
            await until(lambda: len(c["l"].bodies) == 1, "the first is in prefill")
            second = ask(c, 40, None)
            await until(lambda: waiting(c) == 1, "the link is full: the second waits for local prefill")
            assert not c["p"].bodies
            reports.links.clear()
            answer = await second
            assert header(answer, "x-prfaas-route") == "prfaas"
            assert "the other path was free first" in header(answer, "x-prfaas-reason")
            metrics = (await c.request("/metrics", method="GET")).body.decode()
            assert 'reason="idle"' in metrics
            c["l"].gate.set()
            assert (await first).status == 200

    run(main)


def test_a_path_that_dies_gives_up_who_waits_for_it(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, **ONE_AT_A_TIME) as c:
            gates = [asyncio.Event(), asyncio.Event()]
            c["p"].gate, c["l"].gate = gates
            busy = [ask(c, 60, "prfaas"), ask(c, 20)]
            await until(lambda: len(c["p"].bodies) == len(c["l"].bodies) == 1, "both servers are busy")
            forced, free = ask(c, 61, "prfaas"), ask(c, 100, None)
            await until(lambda: waiting(c) == 2, "two wait")
            await c["p"].stop()
            await until(lambda: c.down("p"), "p down")
            gates[1].set()
            assert (await forced).status == 503
            answer = await free
            assert (answer.status, header(answer, "x-prfaas-route")) == (200, "local")
            assert {one.status for one in await asyncio.gather(*busy)} <= {200, 502, 503}

    run(main)


def test_order_can_be_off_and_is_with_a_fixed_threshold(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, order="off") as c:
            assert c.router.policy.line is None
            assert header(await c.short(), "x-prfaas-held-ms") == ""
            assert (await get(c, "/policy"))["order"] is None
        async with cluster() as c:
            assert c.router.policy.line is None
            assert header(await c.short(), "x-prfaas-held-ms") == ""

    run(main)
