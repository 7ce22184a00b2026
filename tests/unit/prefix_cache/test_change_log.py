"""Followers of a change log end with what its index holds, however they read."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.prefix_cache.block_hash import PromptHashes
from sglang_prfaas.prefix_cache.change_log import BLOCKS_A_READ, ChangeLog
from sglang_prfaas.prefix_cache.changes import Change, Cleared, Removed, Stored
from sglang_prfaas.prefix_cache.holder_sets import Part, Tier
from sglang_prfaas.prefix_cache.index import GlobalIndex
from sglang_prfaas.prefix_cache.matching import Holder

HOLDERS = [Holder("a", "p0"), Holder("a", "p1")]
PROMPT = PromptHashes(list(range(60)), 2)


class Follower:
    """Reads a log at its own pace."""

    def __init__(self) -> None:
        self.index = GlobalIndex(10_000, 32)
        self.position = self.cursor = -1
        self.restarts = 0

    def read(self, log: ChangeLog) -> bool:
        """One read; whether there is more."""
        read = log.read(self.position, self.cursor)
        self.restarts += read.restarted
        if read.restarted:
            for holder in self.index.holders:
                self.index.forget(holder)
        for entry in read.changes:
            self.index.apply(entry.holder, (entry.change,))
        self.position, self.cursor = read.position, read.cursor
        return read.more

    def read_all(self, log: ChangeLog) -> None:
        while self.read(log):
            pass


def same(one: GlobalIndex, other: GlobalIndex) -> bool:
    return one.match(PROMPT) == other.match(PROMPT)


def stored(blocks: list[int], tier: Tier = Tier.DEVICE, part: Part = Part.KV) -> Stored:
    return Stored(PROMPT.all[np.array(blocks, np.int64)], tier, part)


_blocks = st.lists(st.integers(0, 29), min_size=1, max_size=8, unique=True)
_change = st.one_of(
    st.just(Cleared()),
    st.builds(stored, _blocks, st.sampled_from(Tier), st.sampled_from(Part)),
    st.builds(lambda b, t, p: Removed(stored(b).hashes, t, p), _blocks, st.sampled_from(Tier), st.sampled_from(Part)),
)
_step = st.one_of(st.just("read"), st.tuples(st.sampled_from(HOLDERS), _change))


@settings(max_examples=200, deadline=None)
@given(st.lists(_step, max_size=40), st.integers(4, 64))
def test_a_follower_ends_with_what_is_there(steps: list[str | tuple[Holder, Change]], log_blocks: int) -> None:
    log, follower = ChangeLog(1000, 32, log_blocks=log_blocks), Follower()
    for step in steps:
        if isinstance(step, str):
            follower.read(log)
        else:
            log.apply(step[0], (step[1],), 2)
    follower.read_all(log)
    assert same(follower.index, log.index)


def test_a_follower_that_was_away_too_long_reads_everything_again() -> None:
    log, follower = ChangeLog(1000, 4, log_blocks=8), Follower()
    log.apply(HOLDERS[0], [stored([0, 1])], 2)
    follower.read_all(log)
    for block in range(2, 20):
        log.apply(HOLDERS[0], [stored([block])])
    follower.read_all(log)
    assert same(follower.index, log.index)
    assert follower.restarts == 2
    assert log.rereads == 2


def test_a_change_larger_than_a_read_comes_in_parts() -> None:
    log = ChangeLog(100_000, 2)
    hashes = PromptHashes(list(range(20_000)), 1).all
    log.apply(HOLDERS[0], [Stored(hashes, Tier.DEVICE)], 1)
    position, blocks, reads = 0, 0, 0
    while position < log.end:
        read = log.read(position, -1)
        sizes = [len(entry.change.hashes) for entry in read.changes if isinstance(entry.change, Stored)]
        assert max(sizes) <= BLOCKS_A_READ
        assert {entry.block_tokens for entry in read.changes} == {1}
        position, blocks, reads = read.position, blocks + sum(sizes), reads + 1
    assert (blocks, reads) == (20_000, 5)


def test_what_was_cleared_is_not_told_again() -> None:
    log, follower = ChangeLog(1000, 4), Follower()
    log.apply(HOLDERS[0], [stored([0, 1, 2])], 2)
    log.apply(HOLDERS[0], [Cleared()])
    log.apply(HOLDERS[1], [stored([0])], 2)
    follower.read_all(log)
    assert set(follower.index.match(PROMPT).by_holder) == {HOLDERS[1]}
