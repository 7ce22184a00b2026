"""The global index against plain sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.errors import PoolFullError
from sglang_prfaas.prefix_cache.block_hash import SHARED, Namespace, PromptHashes
from sglang_prfaas.prefix_cache.changes import Change, Cleared, Removed, Stored
from sglang_prfaas.prefix_cache.holder_sets import HolderSets, Part, Tier
from sglang_prfaas.prefix_cache.index import GlobalIndex, HeldBlocks
from sglang_prfaas.prefix_cache.matching import Holder, PrefixMatch

HOLDERS = [Holder("pd", "prefill-0"), Holder("pd", "prefill-0", 1), Holder("far", "prefill-0"), Holder("far", "x")]
A, B, C = HOLDERS[:3]
PROMPTS = [PromptHashes([prompt // 2, *range(1, 6), prompt, 8, 9, 10], 1) for prompt in range(4)]
DEVICE, HOST, DISK = Tier


class Model:
    """The index as sets of (block, part, tier) per holder."""

    def __init__(self) -> None:
        self.held: dict[Holder, set[tuple[int, Part, Tier]]] = {}

    def apply(self, holder: Holder, change: Change) -> None:
        held = self.held.setdefault(holder, set())
        if isinstance(change, Cleared):
            held.clear()
        elif isinstance(change, Stored):
            held |= {(block, change.part, change.tier) for block in change.hashes.tolist()}
        else:
            parts = (Part.STATE,) if change.part is Part.STATE else (Part.KV, Part.STATE)
            held -= {(block, part, change.tier) for block in change.hashes.tolist() for part in parts}

    def match(self, prompt: PromptHashes) -> dict[Holder, PrefixMatch]:
        found = {}
        for holder, held in self.held.items():
            reach = [0, 0, 0]
            for tier in Tier:
                for block in prompt.all.tolist():
                    if not any((block, Part.KV, near) in held for near in Tier if near <= tier):
                        break
                    reach[tier] += 1
            states = [
                end + 1
                for end, block in enumerate(prompt.all[: reach[2]].tolist())
                if any((block, Part.STATE, tier) in held for tier in Tier)
            ]
            if reach[2]:
                found[holder] = PrefixMatch(reach[0], reach[1], reach[2], max(states, default=0))
        return found


def changes() -> st.SearchStrategy[Change]:
    blocks = st.builds(
        lambda prompt, start, stop: prompt.all[start:stop],
        st.sampled_from(PROMPTS),
        st.integers(0, 9),
        st.integers(0, 10),
    )
    what = (blocks, st.sampled_from(Tier), st.sampled_from([Part.KV, Part.KV, Part.STATE]))
    return st.one_of(st.builds(Stored, *what), st.builds(Stored, *what), st.builds(Removed, *what), st.just(Cleared()))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(HOLDERS), changes()), max_size=40), st.integers(1, 100))
def test_as_plain_sets(script: list[tuple[Holder, Change]], sweep_places: int) -> None:
    index, model = GlobalIndex(100, max_holders=6), Model()
    for holder, change in script:
        index.apply(holder, [change])
        model.apply(holder, change)
        index.sweep(sweep_places)
        for prompt in PROMPTS:
            assert index.match(prompt).by_holder == model.match(prompt)
    while index.sweep(sweep_places):
        pass
    assert index.blocks == len({block for held in model.held.values() for block, _, _ in held})
    for holder, counted in index.held().items():
        held = model.held[holder]
        tiers = [sum(part is Part.KV and on is tier for _, part, on in held) for tier in Tier]
        assert counted == HeldBlocks(
            tiers[0], tiers[1], tiers[2], len({block for block, part, _ in held if part is Part.STATE})
        )


def a_prompt(seed: int = 0, blocks: int = 3000, namespace: Namespace = SHARED) -> PromptHashes:
    return PromptHashes(np.random.default_rng(seed).integers(0, 1000, blocks * 2), 2, namespace)


def test_tiers_and_checkpoints_of_a_long_prompt() -> None:
    index, prompt = GlobalIndex(10_000), a_prompt()
    index.apply(A, [Stored(prompt.upto(2500), HOST), Stored(prompt.upto(700), DEVICE)])
    index.apply(A, [Stored(prompt.all[[99, 999, 2599]], HOST, Part.STATE)])
    index.apply(B, [Stored(prompt.all, DISK)])
    index.apply(C, [Stored(prompt.all[1:], DEVICE)])
    match = index.match(prompt)
    assert match.by_holder == {A: PrefixMatch(700, 2500, 2500, 1000), B: PrefixMatch(0, 0, 3000, 0)}
    assert match.cached_tokens(A, hybrid=True) == 2000
    assert match.cached_tokens(A, hybrid=False) == 5000
    assert match.cached_tokens(C, hybrid=False) == 0
    assert match.cached_tokens(B, hybrid=True) == 0
    assert match.cached_tokens(B, hybrid=False) == 6000


def test_no_more_of_a_prompt_is_hashed_than_is_held() -> None:
    index, prompt = GlobalIndex(10_000), a_prompt()
    assert index.match(prompt).by_holder == {}
    assert prompt._done <= 64


def test_tenants_do_not_see_each_other() -> None:
    index = GlobalIndex(10_000)
    index.apply(A, [Stored(a_prompt(namespace=Namespace("one")).all, DEVICE)])
    assert index.match(a_prompt(namespace=Namespace("two"))).by_holder == {}
    assert index.match(a_prompt(namespace=Namespace("one"))).by_holder


def test_a_full_index_leaves_out_the_ends_of_prefixes() -> None:
    index, prompt = GlobalIndex(1000), a_prompt()
    index.apply(A, [Stored(prompt.all, DEVICE)])
    assert index.dropped_blocks == 2000
    assert index.match(prompt).by_holder == {A: PrefixMatch(1000, 1000, 1000, 0)}
    index.apply(A, [Removed(prompt.all, DEVICE), Stored(prompt.all[:10], DEVICE)])
    assert index.blocks == 10


def test_cleared_holders_vanish_at_once_and_free_their_places() -> None:
    index, prompt = GlobalIndex(200_000, max_holders=2), a_prompt()
    for _ in range(10):
        index.apply(A, [Stored(prompt.all, DEVICE)])
        index.apply(B, [Stored(prompt.upto(5), DEVICE)])
        index.apply(A, [Cleared()])
        assert index.match(prompt).by_holder == {B: PrefixMatch(5, 5, 5, 0)}
        index.forget(A)
    while index.sweep(10_000):
        pass
    assert index.blocks == 5
    assert index.holder_sets == 1
    assert index.holders == (B,)
    index.forget(C)


def test_one_holder_too_many() -> None:
    index = GlobalIndex(100, max_holders=2)
    index.apply(A, [])
    index.apply(B, [])
    with pytest.raises(PoolFullError, match="one more than the 2 holders"):
        index.apply(C, [])


def test_without_a_number_for_a_set_blocks_are_dropped_not_wrong() -> None:
    index, prompt = GlobalIndex(1000), a_prompt(blocks=10)
    index._sets = HolderSets(256, limit=3)  # two sets besides the empty one
    index.apply(A, [Stored(prompt.all, DEVICE)])
    index.apply(B, [Stored(prompt.all[5:], HOST)])
    index.apply(A, [Removed(prompt.all[7:], DEVICE)])
    match = index.match(prompt).by_holder
    assert match == {A: PrefixMatch(7, 7, 7, 0)}
    assert index.dropped_blocks == 3
    index.apply(A, [Removed(prompt.all, DEVICE)])
    index.apply(B, [Removed(prompt.all, HOST)])
    assert (index.blocks, index.holder_sets) == (0, 0)
