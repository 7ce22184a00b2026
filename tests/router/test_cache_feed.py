"""From servers over agents to a router's index, with real sockets: whoever restarts, the index converges."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import (
    AgentConfig,
    PrefixIndexConfig,
    ReportsConfig,
    RouterConfig,
    RouterSection,
    RouterSite,
    ServerConfig,
    SiteConfig,
    SiteSection,
)
from sglang_prfaas.monitor.cache_reports import CacheUpdate
from sglang_prfaas.monitor.kv_subscriber import KvEventSource
from sglang_prfaas.prefix_cache.matching import Holder
from sglang_prfaas.router.agent_links import AgentLinks
from sglang_prfaas.router.body import parse_body
from sglang_prfaas.router.cache_feed import CacheFeed
from sglang_prfaas.router.prefix_lookup import PrefixIndex
from sglang_prfaas.site.agent import Agent
from sglang_prfaas.site.cache_watch import CacheWatch
from sglang_prfaas.site.free_ports import free_ports

from .kv_publisher import KvPublisher
from .pd_fakes import run, until

FIRST, SECOND, OTHER = list(range(40)), list(range(80)), list(range(500, 520))


class Chain:
    """A publisher, an agent and a router's index, each of which can be restarted."""

    def __init__(self, folder: Path) -> None:
        http, self.reports = free_ports(2)
        self.folder = folder
        self.site = SiteConfig(
            site=SiteSection(name="pd", role="pd", model="m"),
            servers=[ServerConfig(name="p0", role="prefill", port=1, bootstrap_port=2)],
            agent=AgentConfig(port=http, reports_port=self.reports, report_interval_s=0.05),
        )
        site = RouterSite(name="pd", role="pd", agent_url=f"http://127.0.0.1:{http}", reports_port=self.reports)
        self.config = RouterConfig(
            router=RouterSection(model=str(folder / "no-model")),
            sites=[site],
            prefix_index=PrefixIndexConfig(checkpoints="off", interval_s=0.02),
            reports=ReportsConfig(heartbeat_interval_s=0.1),
        )
        self.publisher: KvPublisher
        self.agent: Agent
        self.links: AgentLinks
        self.feed: CacheFeed
        self.index: PrefixIndex

    def start_server(self) -> None:
        self.publisher = KvPublisher(self.folder, "p0")

    async def start_agent(self) -> None:
        publisher = self.publisher
        source = KvEventSource(Holder("pd", "p0"), publisher.endpoint, replay_endpoint=publisher.replay_endpoint)
        self.caches = CacheWatch("pd", {"p0": [source]}, 10_000, MonotonicClock())
        self.agent = Agent(self.site, {}, caches=self.caches)
        await self.agent.start()

    async def start_router(self) -> None:
        self.index = PrefixIndex(self.config)

        def updated(update: CacheUpdate) -> None:
            self.feed.updated(update)

        self.links = AgentLinks(self.config.sites, self.config.reports, on_cache=updated)
        self.feed = CacheFeed(self.config, self.index, self.links)
        self.links.start()
        self.feed.start()

    async def stop_router(self) -> None:
        await self.feed.stop()
        await self.links.stop()

    def cached(self, tokens: list[int]) -> int:
        body = parse_body("generate", b'{"input_ids": [1]}')
        body.token_ids = [*tokens, 1]
        found = self.index.match(body).get("pd")
        return found.servers.get("p0", 0) if found is not None else 0


@contextlib.asynccontextmanager
async def chain() -> AsyncIterator[Chain]:
    with tempfile.TemporaryDirectory() as folder:
        it = Chain(Path(folder))
        it.start_server()
        await it.start_agent()
        await it.start_router()
        try:
            it.publisher.stored(FIRST)
            await until(lambda: it.cached(FIRST) == 40, "the first blocks")
            yield it
        finally:
            await it.stop_router()
            await it.agent.stop(0)
            it.publisher.close()


def test_changes_arrive_and_go() -> None:
    async def main() -> None:
        async with chain() as it:
            it.publisher.stored(SECOND)
            await until(lambda: it.cached(SECOND) == 80, "more blocks")
            it.publisher.removed(SECOND)
            await until(lambda: it.cached(SECOND) == 0, "no blocks")

    run(main)


def test_a_restarted_router_reads_everything() -> None:
    async def main() -> None:
        async with chain() as it:
            await it.stop_router()
            it.publisher.stored(SECOND)
            await it.start_router()
            assert it.cached(FIRST) == 0
            await until(lambda: it.cached(SECOND) == 80, "all blocks")

    run(main)


def test_a_restarted_agent_replays_and_the_router_starts_over() -> None:
    async def main() -> None:
        async with chain() as it:
            await it.agent.stop(0)
            it.publisher.removed(FIRST)
            it.publisher.stored(OTHER)
            await it.start_agent()
            await until(lambda: it.cached(OTHER) == 20, "the new blocks")
            await until(lambda: it.cached(FIRST) == 0, "the old blocks are gone")
            assert it.feed.restarts["pd"] == 2

    run(main)


def test_a_restarted_server_holds_nothing_of_before() -> None:
    async def main() -> None:
        async with chain() as it:
            it.publisher.close()
            it.start_server()
            it.publisher.stored(OTHER)
            await until(lambda: it.cached(OTHER) == 20, "the new blocks")
            assert it.cached(FIRST) == 0

    run(main)


def test_a_server_that_is_gone_is_forgotten() -> None:
    async def main() -> None:
        async with chain() as it:
            it.caches.server_gone("p0")
            await until(lambda: it.cached(FIRST) == 0, "its blocks are gone")

    run(main)


def test_all_three_restart() -> None:
    async def main() -> None:
        async with chain() as it:
            await it.stop_router()
            await it.agent.stop(0)
            it.publisher.close()
            await it.start_router()
            it.start_server()
            it.publisher.stored(OTHER)
            await it.start_agent()
            await until(lambda: it.cached(OTHER) == 20, "the new blocks")
            assert it.cached(FIRST) == 0

    run(main)
