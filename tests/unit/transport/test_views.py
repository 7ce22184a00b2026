"""Bytes in several places, cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.transport.views import cut, split

VIEWS = st.lists(st.binary(max_size=40), max_size=8).map(lambda parts: [memoryview(part) for part in parts])


@given(VIEWS, st.integers(1, 50))
def test_pieces_hold_the_same_bytes_and_are_no_longer_than_asked(views: list[memoryview], nbytes: int) -> None:
    pieces = cut(views, nbytes)
    assert b"".join(b"".join(piece) for piece, _ in pieces) == b"".join(views)
    assert all(0 < sum(map(len, piece)) == length <= nbytes for piece, length in pieces)


@given(VIEWS, st.data())
def test_a_split_loses_nothing(views: list[memoryview], data: st.DataObject) -> None:
    whole = b"".join(views)
    count = data.draw(st.integers(0, len(whole)))
    first, rest = split(views, count)
    assert (b"".join(first), b"".join(rest)) == (whole[:count], whole[count:])
