"""From the wire to the decision: movers on a real link, their site's agent, and a router that goes elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.config.schema import (
    AgentConfig,
    LinkConfig,
    ReportsConfig,
    RouterSite,
    ServerConfig,
    SiteConfig,
    SiteSection,
)
from sglang_prfaas.monitor.link_channel import new_endpoint
from sglang_prfaas.monitor.site_reports import SiteReports
from sglang_prfaas.router.agent_links import AgentLinks
from sglang_prfaas.sglang_plugin.link_reports import LinkReports
from sglang_prfaas.site.agent import Agent
from sglang_prfaas.site.free_ports import free_ports
from sglang_prfaas.transport.layout import Component
from tests.lateness import lateness
from tests.router.pd_fakes import MODEL, Cluster, header, run
from tests.router.test_live_policy import REACTION_S, get, live, long_route
from tests.transport.namespaces import Wire, obstacle, wire
from tests.transport.rig import CONFIG, Memory, Pair, layout, some_slots

OBSTACLE = obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)

COUNTS = (16, 1, 1)
PAUSE_S = 0.03
LINK = LinkConfig(to_site="home", capacity_gbps=1.0, rtt_ms=0.1)


BACK_S = 30.0
"""Until requests cross the link again. Measured in a second or two; its old capacity fades with a half-life of 10 s."""


async def longer_route(c: Cluster, words: int) -> str:
    answer = await c.request(body={"model": MODEL, "prompt": "a " * words})
    assert answer.status == 200
    return header(answer, "x-prfaas-route")


class Traffic:
    """Transfers of 1 MiB, one after another: a quarter of the link, until that gets slow."""

    def __init__(self, pair: Pair) -> None:
        self._pair, self._stop = pair, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30.0)

    def _run(self) -> None:
        slots = some_slots(0, COUNTS, COUNTS)
        room = 0
        while not self._stop.wait(PAUSE_S):
            room += 1
            transfer, item = self._pair.ready(room, slots)
            self._pair.send_all(transfer, slots, step=COUNTS[0])
            while item.transfer.live and not self._stop.wait(0.005):
                pass
            self._pair.receiver.release(item)
            self._pair.sender.release(transfer)


@contextlib.contextmanager
def movers(link: Wire, reports: LinkReports) -> Iterator[Pair]:
    of = layout(components=(Component("kv", (1 << 16,)), Component("mamba", (64,)), Component("aux", (64,))))
    pair = Pair(
        host=Wire.near_host,
        config=msgspec.structs.replace(CONFIG, chunk_bytes=1 << 16, security="off"),
        of=of,
        send_memory=Memory(of, 1, COUNTS),
        receive_memory=Memory(of, None, COUNTS),
        site="home",
        links={"home": LINK},
        report=reports,
        within=(link.near.call, link.far.call),
    )
    with pair:
        link.far.call(pair.session)
        yield pair


@contextlib.asynccontextmanager
async def reported(endpoint: str) -> AsyncIterator[tuple[Agent, SiteReports]]:
    """The agent of the far site, and what a router hears of it."""
    http, reports_port = free_ports(2)
    config = SiteConfig(
        site=SiteSection(name="far", role="prfaas", model="/models/tiny"),
        servers=[ServerConfig(name="p", role="prefill", port=1)],
        links=[LINK],
        agent=AgentConfig(port=http, reports_port=reports_port),
    )
    agent = Agent(config, {}, link_reports=endpoint)
    await agent.start()
    entry = RouterSite(name="far", role="prfaas", agent_url=f"http://127.0.0.1:{http}", reports_port=reports_port)
    links = AgentLinks([entry], ReportsConfig())
    links.start()
    try:
        yield agent, links.reports
    finally:
        await links.stop()
        await agent.stop(0)


def test_a_link_that_gets_slow_sends_requests_local_within_a_second(tmp_path: Path) -> None:
    async def main(link: Wire) -> None:
        endpoint = new_endpoint()
        async with reported(endpoint) as (agent, reports), live(tmp_path, reports) as c:
            sender = LinkReports(endpoint, "far", "p/0")
            with movers(link, sender) as pair, Traffic(pair):
                async with asyncio.timeout(30):
                    while (seen := reports.link("far", "home")) is None or seen.used_bytes_per_s < 1e6:
                        await asyncio.sleep(0.01)
                    while await long_route(c) != "prfaas":
                        pass
                with lateness() as late_s:
                    link.rate(20)
                    start_s = time.monotonic()
                    async with asyncio.timeout(30):
                        while await long_route(c) != "local":
                            pass
                    took_s, added_s = time.monotonic() - start_s, late_s()
                after = reports.link("far", "home")
                print(f"local after {took_s:.2f} s, {added_s:.2f} s of which this process did not run; {after}")
                assert took_s < REACTION_S + added_s
                assert after is not None
                assert after.congested
                policy = await get(c, "/policy")
                assert "congested" in str(policy)
                metrics = agent.metrics()
                assert 'prfaas_link_congested{from_site="far",to_site="home"} 1' in metrics
                assert agent.report().links[0].connections == CONFIG.connections
                # Each longer than all before it: where requests of one length come as fast as they are answered, t is
                # that length.
                lengths = itertools.count(80)
                assert [await longer_route(c, next(lengths)) for _ in range(10)] == ["local"] * 10
                link.rate(1000)
                start_s = time.monotonic()
                async with asyncio.timeout(BACK_S):
                    while await longer_route(c, next(lengths)) != "prfaas":
                        pass
                print(f"back after {time.monotonic() - start_s:.2f} s")
            sender.close()

    with wire(1000.0) as link:
        run(lambda: main(link))
