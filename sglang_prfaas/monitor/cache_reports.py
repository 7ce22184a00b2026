"""What agents tell routers of their servers' caches: changes of blocks, read by each router at its own pace.

A router asks (`ReadCache`) and the agent answers (`CacheUpdate`), one answer at a time: nothing can pile up, what is
lost is asked for again, and a router that was away longer than the agent's log reaches back reads everything. Hashes
cross the link, never token ids.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.prefix_cache.change_log import HolderChange, Read
from sglang_prfaas.prefix_cache.changes import Cleared, Removed, Stored
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier
from sglang_prfaas.prefix_cache.matching import Holder

_STORED, _REMOVED, _CLEARED = 0, 1, 2


class ReadCache(Struct, frozen=True, kw_only=True, tag="read_cache"):
    """A router asks what changed since a position. epoch: of the agent that the position is of, 0 for none."""

    epoch: int = 0
    position: int = -1
    cursor: int = -1


class CacheChange(Struct, frozen=True, array_like=True):
    """One change of a server's cache. kind: 0 stored, 1 removed, 2 cleared. hashes: 64-bit, little-endian."""

    server: str
    dp_rank: int
    block_tokens: int
    kind: int
    tier: int = 0
    part: int = 0
    hashes: bytes = b""


class CacheUpdate(Struct, frozen=True, kw_only=True, tag="cache"):
    """The answer to `asked`. Position, cursor, restarted and more are those of `prefix_cache.change_log.Read`."""

    site: str
    epoch: int
    asked: ReadCache
    position: int
    cursor: int
    restarted: bool
    more: bool
    changes: list[CacheChange]


def pack(site: str, epoch: int, asked: ReadCache, read: Read) -> CacheUpdate:
    """A read as a message."""
    return CacheUpdate(
        site=site,
        epoch=epoch,
        asked=asked,
        position=read.position,
        cursor=read.cursor,
        restarted=read.restarted,
        more=read.more,
        changes=[_packed(change) for change in read.changes],
    )


def unpack(site: str, change: CacheChange) -> HolderChange:
    """A change of a message. Raises ProtocolError for one that is none."""
    holder = Holder(site, change.server, change.dp_rank)
    if change.kind == _CLEARED:
        return HolderChange(holder, Cleared(), change.block_tokens)
    if change.kind not in (_STORED, _REMOVED) or len(change.hashes) % 8:
        raise ProtocolError(
            f"cache of {site}: a change of kind {change.kind} with {len(change.hashes)} bytes of hashes"
        )
    hashes = np.frombuffer(change.hashes, "<u8").astype(np.uint64)
    kind: type[Stored | Removed] = Stored if change.kind == _STORED else Removed
    try:
        return HolderChange(holder, kind(hashes, Tier(change.tier), Part(change.part)), change.block_tokens)
    except ValueError as error:
        raise ProtocolError(f"cache of {site}: {error}") from None


def _packed(entry: HolderChange) -> CacheChange:
    holder, change = entry.holder, entry.change
    if isinstance(change, Cleared):
        return CacheChange(holder.server, holder.dp_rank, entry.block_tokens, _CLEARED)
    kind = _STORED if isinstance(change, Stored) else _REMOVED
    hashes = change.hashes.astype("<u8").tobytes()
    return CacheChange(holder.server, holder.dp_rank, entry.block_tokens, kind, change.tier, change.part, hashes)


class CacheReader:
    """A router's place in one agent's log: what to ask next, and whether an answer is the one awaited. Pure."""

    def __init__(self, clock: Clock, *, interval_s: float, timeout_s: float = 2.0) -> None:
        """interval_s: between two questions while there is nothing new. timeout_s: until a question is asked again."""
        self.restarts = 0
        """Times that everything known of the site was void."""
        self._clock = clock
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._next = ReadCache()
        self._asked = False
        self._due_s = clock.now_s()

    def due(self) -> ReadCache | None:
        """The question to send now, None while an answer is awaited or it is too early."""
        now_s = self._clock.now_s()
        if now_s < self._due_s:
            return None
        self._asked, self._due_s = True, now_s + self._timeout_s
        return self._next

    def accept(self, update: CacheUpdate) -> bool:
        """Whether an answer is to be applied: an old or doubled one is not."""
        if not self._asked or update.asked != self._next:
            return False
        self.restarts += update.restarted
        self._asked = False
        self._next = ReadCache(epoch=update.epoch, position=update.position, cursor=update.cursor)
        self._due_s = self._clock.now_s() + (0.0 if update.more else self._interval_s)
        return True
