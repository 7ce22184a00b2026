"""What a site's servers have in their prefix caches: subscribes to their KV events, and answers routers that ask."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import PoolFullError
from sglang_prfaas.monitor.cache_reports import CacheUpdate, ReadCache, pack
from sglang_prfaas.monitor.kv_subscriber import KvEventSource, KvEventSubscriber
from sglang_prfaas.monitor.owned_directory import OwnedDirectory
from sglang_prfaas.prefix_cache.change_log import ChangeLog
from sglang_prfaas.prefix_cache.changes import Change, Cleared
from sglang_prfaas.prefix_cache.matching import Holder
from sglang_prfaas.store.stats import StatsFile, read_stats

logger = logging.getLogger(__name__)


class CacheWatch:
    """The caches of one site. Belongs to one event loop; without sources it holds nothing."""

    def __init__(
        self,
        site: str,
        sources: Mapping[str, list[KvEventSource]],
        max_blocks: int,
        clock: Clock,
        directory: str = "",
        store_stats: str = "",
    ) -> None:
        """sources: by server. directory: of Unix sockets, made at the start and deleted at the end; empty for none.
        store_stats: directory of the prefix store's counters, empty for none."""
        self._store_stats = store_stats
        self._site = site
        self._sources = sources
        self._clock = clock
        self._directory = directory
        self._owned: OwnedDirectory | None = None
        self._epoch = secrets.randbits(53)
        self.log = ChangeLog(max_blocks, max(1, 2 * sum(map(len, sources.values()))))
        self._subscriber: KvEventSubscriber | None = None
        self._full = False

    def start(self) -> None:
        """Subscribe; the servers may start later. Raises OSError where the directory cannot be made."""
        if self._directory:
            self._owned = OwnedDirectory(Path(self._directory))
        loop = asyncio.get_running_loop()

        def deliver(holder: Holder, changes: tuple[Change, ...]) -> None:
            subscriber = self._subscriber
            size = subscriber.block_tokens(holder) if subscriber is not None else 0
            try:
                loop.call_soon_threadsafe(self._apply, holder, changes, size)
            except RuntimeError:
                logger.info("KV events of %s: the agent has stopped", holder)

        if self._sources:
            sources = [source for found in self._sources.values() for source in found]
            self._subscriber = KvEventSubscriber(sources, deliver, clock=self._clock)

    async def stop(self) -> None:
        if self._subscriber is not None:
            await asyncio.to_thread(self._subscriber.close)
            self._subscriber = None
        if self._owned is not None:
            self._owned.remove()
            self._owned = None

    def server_gone(self, server: str) -> None:
        """A server has ended, or its cache was made anew: nothing that it held is there any more."""
        known = self.log.index.holders
        for source in self._sources.get(server, ()):
            if source.holder in known:
                self._apply(source.holder, (Cleared(),), 0)

    def read(self, asked: ReadCache, reply: Callable[[CacheUpdate], None]) -> None:
        """Answer a router."""
        position, cursor = (asked.position, asked.cursor) if asked.epoch == self._epoch else (-1, -1)
        reply(pack(self._site, self._epoch, asked, self.log.read(position, cursor)))

    def describe(self) -> dict[str, Any]:
        """What the servers hold, for `GET /cache`."""
        index, sizes = self.log.index, self.log.block_tokens
        held = index.held()
        counters = self._subscriber.counters() if self._subscriber is not None else {}
        return {
            "site": self._site,
            "blocks": index.blocks,
            "max_blocks": index.max_blocks,
            "dropped_blocks": index.dropped_blocks,
            "index_bytes": index.memory_bytes,
            "log_position": self.log.end,
            "rereads": self.log.rereads,
            "store": self.stores(),
            "caches": [
                {
                    "server": source.holder.server,
                    "dp_rank": source.holder.dp_rank,
                    "block_tokens": sizes.get(source.holder, 0),
                    "held": held.get(source.holder),
                    "events": counters.get(source.holder),
                }
                for found in self._sources.values()
                for source in found
            ],
        }

    def samples(self) -> list[tuple[dict[str, str], float]]:
        """Blocks by server, rank and tier, for `/metrics`."""
        return [
            ({"site": self._site, "server": holder.server, "rank": str(holder.dp_rank), "tier": tier}, count)
            for holder, blocks in self.log.index.held().items()
            for tier, count in msgspec.structs.asdict(blocks).items()
        ]

    def stores(self) -> list[StatsFile]:
        """The prefix store's counters, as its processes wrote them last."""
        try:
            return read_stats(Path(self._store_stats)) if self._store_stats else []
        except (OSError, msgspec.ValidationError, msgspec.DecodeError) as error:
            logger.info("counters of the prefix store in %s: %s", self._store_stats, error)
            return []

    def _apply(self, holder: Holder, changes: tuple[Change, ...], block_tokens: int) -> None:
        try:
            self.log.apply(holder, changes, block_tokens)
        except PoolFullError as error:  # cannot last: every holder is one of the site's
            if not self._full:
                logger.warning("KV events of %s are left out: %s", holder, error)
            self._full = True
