"""What clients are told when a request is refused, and the agent and logprob paths."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sglang_prfaas.config.schema import PolicyConfig, RouterConfig, RouterLimits, RouterSection, RouterSite
from sglang_prfaas.http import Framing, HttpServer, Request, Response
from sglang_prfaas.router.app import Router
from tests.router.pd_fakes import MODEL, FakeServer, WordCounter, cluster, header, raw_exchange, run, until


def error(body: bytes) -> dict[str, Any]:
    value = json.loads(body)["error"]
    assert set(value) == {"message", "type", "param", "code"}
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
def test_malformed_json(path: str) -> None:
    async def main() -> None:
        async with cluster() as c:
            for body in (b"", b"{", b"[]", b'"x"', b'{"a": NaN}', b'{"a": "\xff"}', b"[" * 100_000):
                answer = await c.request(path, body)
                assert answer.status == 400, body[:20]
                assert error(answer.body)["code"] == "invalid_json"
            assert not c["d"].bodies

    run(main)


@pytest.mark.parametrize(
    ("path", "param"), [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt"), ("/generate", "text")]
)
def test_a_body_without_a_prompt_reaches_no_server(path: str, param: str) -> None:
    async def main() -> None:
        async with cluster() as c:
            for body in ({"model": MODEL}, {"model": MODEL, param: None}):
                answer = await c.request(path, body)
                assert answer.status == 400
                assert (error(answer.body)["code"], error(answer.body)["param"]) == ("missing_field", param)
            assert not c["d"].bodies

    run(main)


def test_unknown_model_wrong_method_unknown_route() -> None:
    async def main() -> None:
        async with cluster() as c:
            unknown = await c.request(body={"model": "gpt-9", "prompt": "a"})
            assert unknown.status == 404
            assert error(unknown.body)["code"] == "model_not_found"
            assert error(unknown.body)["param"] == "model"
            for name in (MODEL, "/models/tiny", "default", "adapter", f"{MODEL}:adapter"):
                assert (await c.request(body={"model": name, "prompt": "a"})).status == 200, name
            method = await c.request("/v1/completions", method="GET")
            assert method.status == 405
            assert header(method, "allow") == "POST"
            assert error(method.body)["code"] == "method_not_allowed"
            route = await c.short(x_prfaas_route="mars")
            assert route.status == 400
            assert error(route.body)["code"] == "invalid_route"

    run(main)


def test_a_body_above_the_limit_is_413() -> None:
    async def main() -> None:
        limits = RouterLimits(max_body_bytes=1000, max_header_bytes=2000, health_interval_s=0.05, drain_timeout_s=1)
        async with cluster(limits=limits) as c:
            answer = await raw_exchange(
                c.port, b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 1001\r\n\r\n" + b"x" * 1001
            )
            assert answer.startswith(b"HTTP/1.1 413 ")
            assert error(answer.partition(b"\r\n\r\n")[2])["type"] == "invalid_request_error"
            chunked = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
            answer = await raw_exchange(c.port, chunked + b"3e9\r\n" + b"x" * 1001 + b"\r\n0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 413 ")
            answer = await raw_exchange(c.port, b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 3000 + b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert 'refused_total{status="413"} 2' in (await c.request("/metrics", method="GET")).body.decode()

    run(main)


def test_an_agent_lists_servers_and_changes_their_roles() -> None:
    async def main() -> None:
        rooms: dict[int, Any] = {}
        backs = {
            name: FakeServer(name, role, rooms) for name, role in (("l", "prefill"), ("d", "decode"), ("x", "decode"))
        }
        for back in backs.values():
            await back.listen()
        listed: list[dict[str, Any]] = [
            {"name": "l", "role": "prefill", "state": "ready", "path": "/servers/l", "bootstrap_port": 7000},
            {"name": "d", "role": "decode", "state": "ready", "path": "/servers/d"},
            {"name": "x", "role": "decode", "state": "starting", "path": "/servers/x", "later": 1},
        ]
        from sglang_prfaas.http import Client, relay

        gateway_client = Client()

        async def agent(request: Request, response: Response) -> None:
            if request.path == "/site":
                response.send(200, json.dumps({"name": "home", "role": "pd", "model": "m", "servers": listed}).encode())
                return
            _, _, name, rest = request.target.split(b"/", 3)
            upstream = gateway_client.upstream(backs[name.decode()].url)
            await relay(request, response, upstream, target=b"/" + rest)

        server = HttpServer(agent)
        port = await server.start("127.0.0.1", 0)
        config = RouterConfig(
            router=RouterSection(model=MODEL),
            sites=[RouterSite(name="home", role="pd", agent_url=f"http://127.0.0.1:{port}")],
            policy=PolicyConfig(threshold_tokens=10),
            limits=RouterLimits(health_interval_s=0.05, drain_timeout_s=1),
        )
        router = Router(config, WordCounter())
        router.health.start()
        router_port = await router.server.start("127.0.0.1", 0)
        upstream = router.client.upstream(f"http://127.0.0.1:{router_port}")

        def states() -> dict[str, tuple[str, bool]]:
            return {t.name: (t.role, t.alive) for t in router.registry.targets()}

        expected = {"l": ("prefill", True), "d": ("decode", True), "x": ("decode", False)}
        await until(lambda: states() == expected, "the agent's servers are known")
        answer = await upstream.fetch("POST", "/generate", body=b'{"text": "a b", "stream": true}')
        assert answer.status == 200
        assert answer.body == b"".join(backs["d"].chunks)
        assert backs["l"].bodies[0]["bootstrap_port"] == 7000
        assert backs["l"].bodies[0]["bootstrap_host"] == "127.0.0.1"

        listed[2].update(role="prefill", state="ready", bootstrap_port=7001)
        backs["x"].role = "prefill"
        del listed[0]
        expected = {"d": ("decode", True), "x": ("prefill", True)}
        await until(lambda: states() == expected, "the role change is known")
        answer = await upstream.fetch("POST", "/generate", body=b'{"text": "a b"}')
        assert header(answer, "x-prfaas-prefill") == "home/x"
        assert backs["x"].bodies[0]["bootstrap_port"] == 7001

        await router.stop()
        await server.close()
        await gateway_client.close()
        for back in backs.values():
            await back.stop()

    run(main)


def logprob_answer(tokens: list[str], text: str, index: int | None = None) -> dict[str, Any]:
    meta = {"input_token_logprobs": [[-1.5, 1, t] for t in tokens], "output_token_logprobs": [[-0.5, 2, text]]}
    return {"text": text, "meta_info": meta} | ({} if index is None else {"index": index})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prefill_first", [False, True])
def test_prompt_logprobs_of_prefill_are_merged(stream: bool, prefill_first: bool) -> None:
    async def main() -> None:
        async with cluster() as c:
            held = asyncio.Event()

            def serving(server: FakeServer, answers: list[dict[str, Any]], waits: bool) -> Any:
                async def behave(request: Request, response: Response) -> bool:
                    if waits:
                        await held.wait()
                    if not stream:
                        response.send(200, json.dumps(answers[-1]).encode())
                    else:
                        response.start(200, [(b"content-type", b"text/event-stream")], Framing.CHUNKED)
                        for answer in answers:
                            response.write(b"data: " + json.dumps(answer).encode() + b"\n\n")
                            await asyncio.sleep(0)
                        response.write(b"data: [DONE]\n\n")
                        response.end()
                    held.set()
                    return True

                return behave

            c["l"].behave = serving(c["l"], [logprob_answer(["a", "b"], "")], not prefill_first)
            c["d"].behave = serving(c["d"], [logprob_answer([], "x"), logprob_answer([], "xy")], prefill_first)
            body = {"text": "a b", "stream": stream, "return_logprob": True, "logprob_start_len": 0}
            answer = await c.request("/generate", body)
            assert answer.status == 200
            if stream:
                *events, done, rest = answer.body.split(b"\n\n")
                assert done == b"data: [DONE]"
                assert rest == b""
                got = [json.loads(event.removeprefix(b"data: ")) for event in events]
                assert got == [logprob_answer(["a", "b"], "x"), logprob_answer(["a", "b"], "xy")]
            else:
                assert json.loads(answer.body) == logprob_answer(["a", "b"], "xy")

    run(main)
