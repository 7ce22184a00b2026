"""Cutting, placing and range sets."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.transport.streams import RangeSet, cut, pieces

ranges = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=40)


@given(ranges)
def test_range_set_is_a_set_of_ints(adds: list[tuple[int, int]]) -> None:
    held = RangeSet()
    model: set[int] = set()
    for start, stop in adds:
        new = set(range(start, stop)) - model
        assert held.add(start, stop) == len(new)
        model |= new
        assert held.total == len(model)
        spans = list(held)
        assert {i for a, b in spans for i in range(a, b)} == model
        assert all(a < b for a, b in spans)
        assert all(b < c for (_, b), (c, _) in itertools.pairwise(spans)), "touching ranges are merged"
        assert len(held) == len(spans)


def test_range_set_repr_says_what_it_holds() -> None:
    held = RangeSet()
    held.add(2, 5)
    assert repr(held) == "RangeSet([(2, 5)], 3 bytes)"


sizes = st.lists(st.integers(0, 50), min_size=1, max_size=4)


@given(sizes, st.integers(0, 20), st.integers(0, 12), st.integers(1, 64))
def test_cut_covers_every_byte_once_and_never_crosses_an_item(
    item_bytes: list[int], first_item: int, items: int, chunk_bytes: int
) -> None:
    covered = {buffer: RangeSet() for buffer in range(len(item_bytes))}
    for span in cut(3, tuple(item_bytes), first_item, items, chunk_bytes):
        assert span.component == 3
        assert 0 < span.length <= chunk_bytes
        assert covered[span.buffer].add(span.offset, span.offset + span.length) == span.length
        size = item_bytes[span.buffer]
        if size <= chunk_bytes:
            assert span.offset % size == 0
            assert span.length % size == 0
        else:
            assert span.offset // size == (span.offset + span.length - 1) // size
    for buffer, size in enumerate(item_bytes):
        expected = [(first_item * size, (first_item + items) * size)] if size and items else []
        assert list(covered[buffer]) == expected


def test_cut_of_some_buffers() -> None:
    spans = list(cut(0, (10, 0, 20, 30), 2, 1, 100, [3, 0, 1]))
    assert [(span.buffer, span.offset, span.length) for span in spans] == [(3, 60, 30), (0, 20, 10)]


def test_cut_makes_chunks_as_large_as_whole_items_allow() -> None:
    assert [(s.offset, s.length) for s in cut(0, (30,), 2, 7, 100)] == [(60, 90), (150, 90), (240, 30)]
    assert [(s.offset, s.length) for s in cut(0, (250,), 1, 1, 100)] == [(250, 100), (350, 100), (450, 50)]


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 40))
def test_pieces_cover_a_range_in_order(offset: int, length: int, item_bytes: int) -> None:
    at = offset
    for piece in pieces(offset, length, item_bytes):
        assert 0 <= piece.start < piece.stop <= item_bytes
        assert piece.item * item_bytes + piece.start == at
        at += piece.stop - piece.start
    assert at == offset + length
