"""Pages of different sizes: every token that decode will read comes from where prefill has it."""

from __future__ import annotations

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.layout import Component, Layout, Sharding
from sglang_prfaas.transport.paging import PromptPages, cut, obstacle, repaged, unit_of
from sglang_prfaas.transport.reshape import problems

Slots = npt.NDArray[np.int64]

PAGES_16 = Component("kv", (16 * 64, 16 * 32), (Sharding(1, 16, (4,), 16), Sharding(1, 16, (4,), 8)))
WINDOW_16 = Component("swa", (16 * 24,), (Sharding(1),))
STATE = Component("mamba", (1000,))
LAYOUT = Layout("Hybrid-abc", "float16", 16, 1, "", (), (PAGES_16, WINDOW_16, STATE, Component("aux", (8,))))


def pages_of(tokens: int, page_tokens: int, seed: int) -> Slots:
    """Slots of the pages of so many tokens."""
    return np.random.default_rng(seed).permutation(-(-tokens // page_tokens) + 3)[: -(-tokens // page_tokens)]


def at_tokens(slots: Slots, unit_tokens: int, first: int, stop: int, begins: int) -> list[int]:
    """Where tokens `first` to `stop` lie, as numbers of a pool's tokens; the slots' first token is `begins`."""
    found = []
    for token in range(first, stop):
        unit, offset = divmod(token - begins, unit_tokens)
        found.append(int(slots[unit]) * unit_tokens + offset)
    return found


sizes = st.sampled_from([1, 2, 4, 6, 16, 64])


@given(sizes, sizes, st.integers(1, 400), st.integers(0, 20), st.integers(1, 130), st.lists(st.integers(1, 99)))
def test_every_token_comes_from_its_place(
    ours: int, theirs: int, tokens: int, prefix_pages: int, window: int, chunks: list[int]
) -> None:
    """A prompt in chunks of so many tokens, of which decode has the first pages; and its last `window` tokens."""
    unit = unit_of(ours, theirs)
    prefix = min(prefix_pages * theirs, (tokens - 1) // theirs * theirs)
    window_first = max(prefix, tokens - window) // theirs * theirs
    expected = [
        -(-(tokens - prefix) // theirs) * theirs // unit,
        -(-(tokens - window_first) // theirs) * theirs // unit,
    ]
    prompt = PromptPages(ours, unit, theirs, prefix, expected)
    assert prompt.first_token % ours == 0
    pool = pages_of(tokens, ours, 1)
    pages = pool[prompt.first_token // ours :]
    assert prompt.agreed(len(pages)) == expected[0]

    sent: list[Slots] = []
    done, at = 0, prompt.first_token
    for chunk in [*chunks, tokens]:
        at = min(tokens, at + chunk)
        last = at == tokens
        stop = -(-(at - prompt.first_token) // ours) if last else (at - prompt.first_token) // ours
        first, units = prompt.units(done, pages[done:stop], last=last)
        assert first == sum(map(len, sent))
        sent.append(units)
        done = stop
        if last:
            break
    units = np.concatenate(sent)
    assert len(units) == expected[0]
    wanted = at_tokens(cut(pool, ours // unit), unit, prefix, tokens, 0)
    assert at_tokens(units, unit, prefix, tokens, prefix) == wanted

    ours_first = max(prompt.first_token, tokens - window) // ours * ours
    held = pages_of(tokens, ours, 2)[ours_first // ours :]
    units = prompt.window(1, held, len(pages))
    assert len(units) == expected[1]
    first = max(prefix, tokens - window)
    wanted = at_tokens(cut(held, ours // unit), unit, first, tokens, ours_first)
    assert at_tokens(units, unit, first, tokens, window_first) == wanted


def test_prompts_of_other_lengths_do_not_fit() -> None:
    assert PromptPages(16, 16, 64, 0, [8]).agreed(4) == 4, "decode reserved two pages of 64, the prompt has one"
    assert PromptPages(64, 16, 16, 0, [3]).agreed(2) == 8
    assert PromptPages(16, 16, 16, 0, [3]).agreed(2) == 2
    assert PromptPages(16, 16, 64, 0, [0]).agreed(0) == 0
    for held, expected in (([1], [4, 8]), ([], [4, 4]), ([1, 2, 3, 4], [4, 0])):
        with pytest.raises(LocalError, match="tokens of component 1, decode reserved"):
            PromptPages(16, 16, 64, 0, expected).window(1, np.array(held, dtype=np.int64), 4)


def test_a_layout_in_units() -> None:
    small = repaged(LAYOUT, 4)
    assert small.page_tokens == 4
    assert small.components[0] == Component("kv", (4 * 64, 4 * 32), (Sharding(1, 4, (4,), 16), Sharding(1, 4, (4,), 8)))
    assert small.components[1:] == (Component("swa", (4 * 24,), (Sharding(1),)), STATE, LAYOUT.components[3])
    assert repaged(LAYOUT, 16) == LAYOUT
    assert problems(LAYOUT, small) == problems(small, LAYOUT) == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kv_format": "HND"}, "byte layout HND"),
        ({"components": (PAGES_16, Component("dsa", (128,)))}, "how dsa is divided among pages is not known"),
        ({"components": (Component("kv", (1000,)),)}, "pages of kv are not one row for each token"),
        ({"page_tokens": 0}, "pages of 0 tokens are no multiple"),
        (
            {"page_tokens": 16 << 20, "components": (Component("kv", ((16 << 20) * 64, (16 << 20) * 32)),)},
            "pages have more than 65536 tokens",
        ),
    ],
)
def test_pages_that_cannot_be_cut(changes: dict[str, object], why: str) -> None:
    odd = msgspec.structs.replace(LAYOUT, **changes)
    other = msgspec.structs.replace(repaged(LAYOUT, 4), kv_format=odd.kv_format)
    assert why in obstacle(odd, 4)
    for pair in ((odd, other), (other, odd)):
        (problem,) = problems(*pair)
        assert why in problem
        assert "give both servers the same --page-size" in problem
