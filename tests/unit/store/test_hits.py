from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.store.hits import Need, Policy, best_hit

KEYS = [f"{number:02x}" for number in range(8)]


def hit(kv: str, need: Need | None = None, other: str = "") -> tuple[int, tuple[int, ...], dict[str, int]]:
    """`kv`, `other`: a digit for each page that exists."""

    def contains(component: str, key: str) -> bool:
        return str(int(key, 16)) in (kv if component == "kv" else other)

    found = best_hit(KEYS, [need] if need else [], contains)
    return found.pages, found.usable, found.found


def need(policy: Policy, trailing: int = 1) -> Need:
    return Need(component="mamba", policy=policy, trailing=trailing)


def test_full_attention_takes_any_prefix_without_a_gap() -> None:
    assert hit("0124") == (3, (1, 2, 3), {"kv": 3})
    assert hit("12") == (0, (), {"kv": 0})


def test_state_takes_only_prefixes_that_end_at_a_checkpoint() -> None:
    assert hit("012345", need("trailing_pages"), "14") == (5, (2, 5), {"kv": 6, "mamba": 5})
    assert hit("0123", need("trailing_pages"), "14") == (2, (2,), {"kv": 4, "mamba": 2})
    assert hit("0123", need("trailing_pages"), "67") == (0, (), {"kv": 4, "mamba": 0})


def test_a_window_takes_its_last_pages_or_all_of_a_shorter_prefix() -> None:
    assert hit("01234567", need("trailing_pages", 3), "0134567")[1] == (1, 2, 6, 7, 8)


def test_all_pages_needs_each_of_both() -> None:
    assert hit("01234", need("all_pages"), "01345") == (2, (1, 2), {"kv": 5, "mamba": 2})


def test_block_groups_report_whole_groups_and_never_limit() -> None:
    groups = Need(component="mamba", policy="block_groups", keys=KEYS[:5], block_pages=4, group_pages=2)
    assert hit("012", groups, "01234") == (3, (1, 2, 3), {"kv": 3, "mamba": 8})


@given(st.sets(st.integers(0, 7)), st.sets(st.integers(0, 7)), st.integers(1, 4))
def test_every_usable_length_has_what_it_needs(kv: set[int], state: set[int], trailing: int) -> None:
    found = best_hit(
        KEYS,
        [need("trailing_pages", trailing)],
        lambda component, key: int(key, 16) in (kv if component == "kv" else state),
    )
    for length in range(1, len(KEYS) + 1):
        last = set(range(max(0, length - trailing), length))
        assert (length in found.usable) == (set(range(length)) <= kv and last <= state)
    assert found.pages == max(found.usable, default=0)
