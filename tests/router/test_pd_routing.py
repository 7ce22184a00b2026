"""The router between clients and PD servers: routes, headers, byte-for-byte relay, failover."""

from __future__ import annotations

import asyncio
import json

import pytest

from sglang_prfaas.config.schema import RouterLimits
from tests.router.pd_fakes import MODEL, cluster, header, raw_exchange, run, until


def test_short_goes_local_long_goes_remote() -> None:
    async def main() -> None:
        async with cluster() as c:
            short = await c.short()
            assert short.status == 200
            assert short.body == c["d"].answer
            assert header(short, "x-upstream") == "yes"
            assert header(short, "content-type") == "application/json"
            assert header(short, "x-prfaas-route") == "local"
            assert header(short, "x-prfaas-reason") == "uncached 3 <= t 10"
            assert header(short, "x-prfaas-prefill") == "home/l"
            assert header(short, "x-prfaas-decode") == "home/d"
            assert header(short, "x-prfaas-input-tokens") == "3"
            assert header(short, "x-prfaas-uncached-tokens") == "3"
            assert header(short, "x-request-id")

            long = await c.long(x_request_id="mine")
            assert header(long, "x-prfaas-route") == "prfaas"
            assert header(long, "x-prfaas-reason") == "uncached 51 > t 10"
            assert header(long, "x-prfaas-prefill") == "far/p"
            assert header(long, "x-request-id") == "mine"
            (prefill,), decode = c["p"].bodies, c["d"].bodies[1]
            assert prefill == decode
            assert prefill["bootstrap_host"] == "127.0.0.1"
            assert prefill["bootstrap_port"] == 9001
            assert prefill["bootstrap_room"] == int(header(long, "x-prfaas-room")) < 1 << 63
            assert c["l"].bodies[0]["bootstrap_port"] == 9002

    run(main)


def test_streams_are_relayed_byte_for_byte() -> None:
    async def main() -> None:
        async with cluster() as c:
            body = json.dumps({"prompt": "a", "stream": True}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            answer = await raw_exchange(c.port, head % len(body) + body)
            got_head, _, got = answer.partition(b"\r\n\r\n")
            assert b"content-type: text/event-stream; charset=utf-8" in got_head
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in c["d"].chunks)
            assert got == chunks + b"0\r\n\r\n"

    run(main)


def test_keep_alive_serves_many_requests_over_one_connection() -> None:
    async def main() -> None:
        async with cluster(limits=RouterLimits(health_interval_s=60.0)) as c:  # no check takes a connection
            for i in range(20):
                answer = await c.request(body={"prompt": "a", "stream": i % 2 == 0})
                assert answer.status == 200
            assert c.router.server.connections == 1
            assert len({r.peer for r in c["d"].requests}) == 1

    run(main)


def test_batches_get_a_room_per_prompt() -> None:
    async def main() -> None:
        async with cluster() as c:
            await c.request(body={"prompt": ["a b", "c"]})
            sent = c["d"].bodies[-1]
            assert sent["bootstrap_host"] == ["127.0.0.1"] * 2
            assert len(set(sent["bootstrap_room"])) == 2
            await c.request("/generate", {"input_ids": [[1, 2], [3], [4]], "sampling_params": {"n": 1}})
            assert len(c["d"].bodies[-1]["bootstrap_room"]) == 3
            await c.request("/generate", {"input_ids": [1, 2, 3]})
            assert isinstance(c["d"].bodies[-1]["bootstrap_room"], int)

    run(main)


def test_a_clients_own_bootstrap_fields_and_overrides_are_replaced() -> None:
    async def main() -> None:
        async with cluster() as c:
            answer = await c.request(
                body={"prompt": "a", "bootstrap_host": "evil", "bootstrap_room": 1, "bootstrap_port": 2, "n": 3},
                x_override_bootstrap_host="evil",
                authorization="Bearer key",
            )
            assert answer.status == 200
            sent = c["l"].bodies[-1]
            assert sent["bootstrap_host"] == "127.0.0.1"
            assert sent["bootstrap_port"] == 9002
            assert sent["bootstrap_room"] > 1
            assert sent["n"] == 3
            assert c["l"].requests[-1].header(b"x-override-bootstrap-host") is None
            assert c["l"].requests[-1].header(b"authorization") == b"Bearer key"

    run(main)


def test_the_least_loaded_server_of_each_role_is_taken() -> None:
    async def main() -> None:
        async with cluster(prfaas=("p1", "p2"), decode=("d1", "d2")) as c:
            gate = asyncio.Event()
            for name in ("p1", "p2"):
                c[name].gate = gate
            both = [asyncio.create_task(c.long()) for _ in range(2)]
            await until(lambda: bool(c["p1"].bodies and c["p2"].bodies), "both prefill servers at work")
            assert len(c["d1"].bodies) == len(c["d2"].bodies) == 1
            gate.set()
            for answer in await asyncio.gather(*both):
                assert answer.status == 200
            assert all(t.inflight_requests == t.inflight_tokens == 0 for t in c.router.registry.targets())

    run(main)


@pytest.mark.parametrize(("route", "server"), [("local", "home/l"), ("prfaas", "far/p")])
def test_a_header_forces_the_route(route: str, server: str) -> None:
    async def main() -> None:
        async with cluster() as c:
            for send in (c.short, c.long):
                answer = await send(x_prfaas_route=route)
                assert header(answer, "x-prfaas-route") == route
                assert header(answer, "x-prfaas-prefill") == server
                assert header(answer, "x-prfaas-reason").startswith("forced by header; uncached")

    run(main)


def test_a_forced_route_that_is_down_is_refused() -> None:
    async def main() -> None:
        async with cluster() as c:
            await c["p"].stop()
            await until(lambda: c.down("p"), "p down")
            answer = await c.short(x_prfaas_route="prfaas")
            assert answer.status == 503
            assert "no PrfaaS prefill server is alive" in json.loads(answer.body)["error"]["message"]

    run(main)


def test_no_prfaas_site_alive_everything_goes_local_and_back() -> None:
    async def main() -> None:
        async with cluster() as c:
            await c["p"].stop()
            await until(lambda: c.down("p"), "p down")
            answer = await c.long()
            assert answer.status == 200
            assert header(answer, "x-prfaas-route") == "local"
            assert header(answer, "x-prfaas-reason") == ("uncached 51 > t 10, but no PrfaaS prefill server is alive")
            await c["p"].listen(c["p"].port)
            await c.all_up()
            assert header(await c.long(), "x-prfaas-route") == "prfaas"

    run(main)


def test_local_prefill_gone_everything_goes_remote() -> None:
    async def main() -> None:
        async with cluster() as c:
            await c["l"].stop()
            await until(lambda: c.down("l"), "l down")
            answer = await c.short()
            assert answer.status == 200
            assert header(answer, "x-prfaas-route") == "prfaas"
            assert header(answer, "x-prfaas-reason") == "uncached 3 <= t 10, but no local prefill server is alive"

    run(main)


def test_no_decode_alive_is_503_and_unhealthy() -> None:
    async def main() -> None:
        async with cluster() as c:
            assert (await c.request("/health", method="GET")).status == 200
            await c["d"].stop()
            await until(lambda: c.down("d"), "d down")
            answer = await c.short()
            assert answer.status == 503
            assert json.loads(answer.body)["error"]["code"] == "no_decode"
            assert header(answer, "retry-after") == "1"
            health = await c.request("/health", method="GET")
            assert health.status == 503
            assert json.loads(health.body)["status"] == "no decode server"
            assert (await c.request("/v1/models", method="GET")).status == 503

    run(main)


def test_other_endpoints_pass_through_to_decode() -> None:
    async def main() -> None:
        async with cluster() as c:
            answer = await c.request("/tokenize?x=1", body=b'{"prompt": "a"}')
            assert answer.body == b"passed /tokenize?x=1"
            assert header(answer, "x-prfaas-decode") == "home/d"
            assert c["d"].requests[-1].body == b'{"prompt": "a"}'
            assert json.loads((await c.request("/v1/models", method="GET")).body)["data"][0]["id"] == MODEL
            for path in (
                "/flush_cache",
                "/pd_role_switch",
                "/%66lush_cache",
                "/hicache/storage-backend",
                "//flush_cache/",
            ):
                refused = await c.request(path)
                assert refused.status == 403, path
                assert json.loads(refused.body)["error"]["code"] == "admin_endpoint"
            assert (await c.request("/x/../flush_cache")).status == 400

    run(main)


def test_admin_endpoints_pass_where_allowed() -> None:
    async def main() -> None:
        async with cluster(allow_admin=True) as c:
            assert (await c.request("/flush_cache")).body == b"passed /flush_cache"

    run(main)


def test_concurrent_load_keeps_answers_apart() -> None:
    async def main() -> None:
        async with cluster(prfaas=("p1", "p2"), local=("l1", "l2"), decode=("d1", "d2")) as c:

            async def client(i: int) -> None:
                for j in range(10):
                    send = c.long if (i + j) % 2 else c.short
                    answer = await send(x_request_id=f"{i}-{j}")
                    assert answer.status == 200
                    assert header(answer, "x-request-id") == f"{i}-{j}"
                    assert header(answer, "x-prfaas-route") == ("prfaas" if (i + j) % 2 else "local")

            await asyncio.gather(*(client(i) for i in range(32)))
            assert all(t.inflight_requests == t.inflight_tokens == 0 for t in c.router.registry.targets())
            text = (await c.request("/metrics", method="GET")).body.decode()
            assert 'endpoint="completions",route="prfaas",reason="long",status="200"} 160' in text
            assert 'prfaas_router_ttft_seconds_count{route="local"} 160' in text

    run(main)
