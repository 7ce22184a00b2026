"""Block hashes equal those of SGLang 0.5.23, whose recorder of KV events printed the values below."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.prefix_cache.block_hash import SHARED, Namespace, PromptHashes

TOKENS = [(i * 7919) % 50000 for i in range(25)]
SALTED = Namespace(cache_salt="tenant-a")

GOLDEN = {
    "plain": (SHARED, [-2464728121447012512, -2258156269887495294, -5055782332898623173]),
    "salt": (SALTED, [5852554577008946068, -1413517707836174423, 6703611791240398298]),
    "adapter": (
        Namespace(cache_salt="tenant-a", extra_key="id1"),
        [7550852665746998443, 4351032869668303298, -885528261017499415],
    ),
    "dynamo": (
        Namespace(cache_salt="tenant-a", extra_key="k", dynamo_format=True),
        [-4332544679549707407, -8944331595314057257, -259646042427482093],
    ),
    "dynamo without a namespace": (
        Namespace(dynamo_format=True),
        [-2464728121447012512, -2258156269887495294, -5055782332898623173],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_equal_to_sglang(name: str) -> None:
    namespace, published = GOLDEN[name]
    assert PromptHashes(TOKENS, 8, namespace).all.view(np.int64).tolist() == published


def test_pairs_of_tokens_equal_to_sglang() -> None:
    published = [8177996968903275344, -7465527563989810398, 8970542782205631138]
    assert PromptHashes(TOKENS, 8, bigram=True).all.view(np.int64).tolist() == published
    assert len(PromptHashes(TOKENS[:24], 8, bigram=True)) == 2, "24 tokens are 23 pairs"


def test_only_whole_blocks() -> None:
    assert len(PromptHashes(TOKENS, 8)) == 3
    assert len(PromptHashes([], 8)) == 0
    assert PromptHashes([], 8).all.tolist() == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=60), st.integers(1, 9), st.lists(st.integers(0, 70), max_size=4))
def test_in_steps_as_at_once(tokens: list[int], block_tokens: int, steps: list[int]) -> None:
    whole = PromptHashes(tokens, block_tokens, SALTED).all
    stepwise = PromptHashes(tokens, block_tokens, SALTED)
    for step in steps:
        assert np.array_equal(stepwise.upto(step), whole[:step])
    assert np.array_equal(stepwise.all, whole)


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_a_hash_stands_for_the_whole_prefix(one: list[int], two: list[int]) -> None:
    for end, (a, b) in enumerate(zip(PromptHashes(one, 2).all, PromptHashes(two, 2).all, strict=False), start=1):
        assert (a == b) == (one[: 2 * end] == two[: 2 * end])


def test_tenants_share_no_hash() -> None:
    hashes = [set(PromptHashes(TOKENS, 8, Namespace(cache_salt=salt)).all.tolist()) for salt in ("a", "b", None)]
    assert len(set.union(*hashes)) == 9
    assert PromptHashes(TOKENS, 8, Namespace(cache_salt="")).all.tolist() == PromptHashes(TOKENS, 8).all.tolist()


@pytest.mark.parametrize("tokens", [[-1], [2**32], [0.5]])
def test_refuses_what_is_no_token(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="token ids must be"):
        PromptHashes(tokens, 1)


def test_refuses_empty_blocks() -> None:
    with pytest.raises(ValueError, match="block_tokens is 0"):
        PromptHashes([1], 0)
