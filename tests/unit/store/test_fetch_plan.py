from __future__ import annotations

from sglang_prfaas.store.fetch_plan import groups_of, joined, ordered, parts, wanted
from sglang_prfaas.store.hits import Hit, Need

KEYS = ["a", "b", "c", "d"]
STATE = Need(component="mamba", policy="trailing_pages")
WINDOW = Need(component="swa", policy="trailing_pages", trailing=2)
INDEXER = Need(component="indexer", policy="all_pages")
GROUPS = Need(component="blocks", policy="block_groups", keys=("x", "y", "z", "w"), block_pages=2, group_pages=2)


def nothing(component: str, key: str) -> bool:
    return False


def test_what_is_here_is_not_asked_for() -> None:
    local = Hit(pages=0, usable=(), found={"kv": 2, "mamba": 0})
    held = {("mamba", "a"), ("kv", "d")}
    found = wanted(KEYS, [STATE], local, lambda c, k: (c, k) in held)
    assert found == [("mamba", "b"), ("mamba", "c"), ("mamba", "d"), ("kv", "c")]


def test_a_prefix_consists_of_its_pages_and_what_each_component_needs() -> None:
    assert parts(KEYS, [], 2) == [("kv", "a"), ("kv", "b")]
    assert parts(KEYS, [STATE], 3)[0] == ("mamba", "c")
    assert parts(KEYS, [WINDOW], 3)[:2] == [("swa", "b"), ("swa", "c")]
    assert parts(KEYS, [WINDOW], 1)[0] == ("swa", "a")
    assert [key for c, key in parts(KEYS, [INDEXER], 2) if c == "indexer"] == ["a", "b"]
    assert [key for c, key in parts(KEYS, [GROUPS], 2) if c == "blocks"] == ["x", "y"]
    assert [key for c, key in parts(KEYS, [GROUPS], 3) if c == "blocks"] == ["x", "y", "z", "w"]


def test_groups_and_order_agree() -> None:
    items = [("mamba", "d"), ("kv", "a"), ("mamba", "c"), ("kv", "b")]
    groups = groups_of(items, {"mamba": "n/mamba", "kv": "n/kv"})
    assert groups == (("n/mamba", ("d", "c")), ("n/kv", ("a", "b")))
    assert [key for _, key in ordered(items)] == [key for _, keys in groups for key in keys]


def test_between_two_checkpoints_nothing_becomes_usable() -> None:
    local = Hit(pages=1, usable=(1,), found={"kv": 2, "mamba": 1})
    hit = Hit(pages=4, usable=(1, 2, 4), found={"kv": 4, "mamba": 4})
    assert joined(local, hit, [STATE]) == Hit(pages=4, usable=(1, 4), found={"kv": 4, "mamba": 4})
    assert joined(local, hit, []).usable == (1, 2, 4)
