"""The router's process: it listens, and finishes what is in work when it is told to stop."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from sglang_prfaas.config.schema import RouterLimits
from sglang_prfaas.errors import LocalError
from sglang_prfaas.http import UpstreamConnectError
from sglang_prfaas.router.process import run_router
from sglang_prfaas.site.free_ports import free_ports
from tests.router.pd_fakes import DEADLINE_S, WordCounter, cluster, run, until


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
