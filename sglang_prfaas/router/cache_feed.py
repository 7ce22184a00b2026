"""Keeps the router's prefix index up to date: asks the agents, and listens to servers that have none."""

from __future__ import annotations

import asyncio
import logging

from sglang_prfaas.clock import Clock, MonotonicClock
from sglang_prfaas.config.schema import RouterConfig
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.monitor.cache_reports import CacheReader, CacheUpdate, unpack
from sglang_prfaas.monitor.kv_subscriber import KvEventSource, KvEventSubscriber
from sglang_prfaas.prefix_cache.change_log import HolderChange
from sglang_prfaas.prefix_cache.changes import Change
from sglang_prfaas.prefix_cache.matching import Holder
from sglang_prfaas.router.agent_links import AgentLinks
from sglang_prfaas.router.prefix_lookup import PrefixIndex

logger = logging.getLogger(__name__)


class CacheFeed:
    """Belongs to one event loop."""

    def __init__(
        self, config: RouterConfig, index: PrefixIndex, agents: AgentLinks, *, clock: Clock | None = None
    ) -> None:
        self._clock = clock or MonotonicClock()
        self._index = index
        self._agents = agents
        self._interval_s = config.prefix_index.interval_s
        self._readers = {site: CacheReader(self._clock, interval_s=self._interval_s) for site in agents.sites}
        self._sources = [
            KvEventSource(
                Holder(site.name, server.name),
                server.kv_events,
                replay_endpoint=server.kv_replay,
                topic=server.kv_topic,
                infer_states=True,
            )
            for site in config.sites
            for server in site.servers
            if server.kv_events
        ]
        self._subscriber: KvEventSubscriber | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def restarts(self) -> dict[str, int]:
        """By site: times that everything known of it was void and read again."""
        return {site: reader.restarts for site, reader in self._readers.items()}

    def start(self) -> None:
        """Begin to ask and to listen."""
        loop = asyncio.get_running_loop()

        def deliver(holder: Holder, changes: tuple[Change, ...]) -> None:
            size = self._subscriber.block_tokens(holder) if self._subscriber is not None else 0
            try:
                loop.call_soon_threadsafe(self._apply, holder, changes, size)
            except RuntimeError:
                logger.info("KV events of %s: the router has stopped", holder)

        if self._sources:
            self._subscriber = KvEventSubscriber(self._sources, deliver, clock=self._clock)
        if self._readers:
            self._task = asyncio.create_task(self._ask(), name="cache feed")

    async def stop(self) -> None:
        """Stop; what is known stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None
        if self._subscriber is not None:
            await asyncio.to_thread(self._subscriber.close)
            self._subscriber = None

    def updated(self, update: CacheUpdate) -> None:
        """An agent has answered."""
        reader = self._readers.get(update.site)
        if reader is None or not reader.accept(update):
            return
        if update.restarted:
            logger.info("cache of %s: read anew, the agent's log does not reach back", update.site)
            self._index.forget(update.site)
        try:
            for change in update.changes:
                self._index.apply(unpack(update.site, change))
        except ProtocolError as error:
            logger.warning("%s", error)
        self._send(update.site, reader)

    async def _ask(self) -> None:
        while True:
            for site, reader in self._readers.items():
                self._send(site, reader)
            await asyncio.sleep(self._interval_s)

    def _send(self, site: str, reader: CacheReader) -> None:
        request = reader.due()
        if request is not None:
            self._agents.read_cache(site, request)

    def _apply(self, holder: Holder, changes: tuple[Change, ...], block_tokens: int) -> None:
        for change in changes:
            self._index.apply(HolderChange(holder, change, block_tokens))


def is_fed(config: RouterConfig) -> bool:
    """Whether any site tells what its servers' caches hold."""
    return any(site.reports_port or any(server.kv_events for server in site.servers) for site in config.sites)
