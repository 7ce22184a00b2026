"""What one site's caches hold, and the order in which that changed: others follow it at their own pace.

A follower reads from a position of the log on. Where the log does not reach back so far, or begins anew, it reads the
whole index first, piece by piece, and then the log from where that reading began. A piece may be newer than that
position: doing a change twice does no harm, and the last change of a block always wins, so the follower ends with what
is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from msgspec import Struct

from sglang_prfaas.prefix_cache.changes import Change, Cleared, Removed, Stored
from sglang_prfaas.prefix_cache.index import GlobalIndex
from sglang_prfaas.prefix_cache.matching import Holder

BLOCKS_A_READ = 4096
"""About the blocks of one read: a few milliseconds of work for who applies it."""
_LOG_CHANGES = 1 << 16


class HolderChange(Struct, frozen=True, eq=False):
    """A change of one holder's cache. block_tokens: tokens of its blocks, 0 where it is not known yet."""

    holder: Holder
    change: Change
    block_tokens: int


class Read(Struct, frozen=True):
    """What a follower gets, and where it is then. cursor: the place of the index to read on from, -1: the log.
    restarted: what the follower had before is void. more: there is more to read at once."""

    changes: list[HolderChange]
    position: int
    cursor: int
    restarted: bool
    more: bool


class ChangeLog:
    """An index with a log of its last changes, `log_blocks` blocks of them; not safe for several threads."""

    def __init__(self, max_blocks: int, max_holders: int, log_blocks: int = 1 << 18) -> None:
        self.index = GlobalIndex(max_blocks, max_holders)
        self.rereads = 0
        """Times that a follower had to read everything."""
        self._log_blocks = log_blocks
        self._log: deque[HolderChange] = deque()
        self._first = 0  # position of the oldest change in the log
        self._blocks = 0
        self._block_tokens: dict[Holder, int] = {}

    @property
    def end(self) -> int:
        """Position after the last change."""
        return self._first + len(self._log)

    @property
    def block_tokens(self) -> dict[Holder, int]:
        """Tokens of each holder's blocks, as far as known."""
        return self._block_tokens

    def apply(self, holder: Holder, changes: Iterable[Change], block_tokens: int = 0) -> None:
        """Take in what happened to a holder's cache, in order. Raises PoolFullError for one holder too many."""
        if block_tokens:
            self._block_tokens[holder] = block_tokens
        size = self._block_tokens.get(holder, 0)
        for change in changes:
            for piece in _pieces(change):
                self.index.apply(holder, (piece,))
                self._log.append(HolderChange(holder, piece, size))
                self._blocks += _blocks(piece)
        while self._blocks > self._log_blocks or len(self._log) > _LOG_CHANGES:
            self._blocks -= _blocks(self._log.popleft().change)
            self._first += 1

    def read(self, position: int, cursor: int) -> Read:
        """What follows a position. Any position that this log never had begins anew."""
        restarted = not self._first <= position <= self.end
        if restarted:
            self.rereads += 1
            position, cursor = self.end, 0
        if cursor >= 0:
            found, cursor = self.index.export(cursor, BLOCKS_A_READ)
            changes = [HolderChange(holder, change, self._block_tokens.get(holder, 0)) for holder, change in found]
            return Read(changes, position, cursor, restarted, cursor >= 0 or position < self.end)
        changes, blocks = [], 0
        while position < self.end and blocks < BLOCKS_A_READ:
            changes.append(self._log[position - self._first])
            blocks += _blocks(changes[-1].change)
            position += 1
        return Read(changes, position, -1, False, position < self.end)


def _blocks(change: Change) -> int:
    return 0 if isinstance(change, Cleared) else len(change.hashes)


def _pieces(change: Change) -> Iterable[Change]:
    """A change in parts of one read's size at most."""
    if isinstance(change, Cleared) or len(change.hashes) <= BLOCKS_A_READ:
        return (change,)
    kind: type[Stored | Removed] = type(change)
    starts = range(0, len(change.hashes), BLOCKS_A_READ)
    return [kind(change.hashes[start : start + BLOCKS_A_READ], change.tier, change.part) for start in starts]
