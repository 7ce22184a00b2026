from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.store.objects import consecutive, frame_head, head_bytes, is_intact


@given(st.text(max_size=80), st.binary(max_size=200))
def test_a_frame_is_intact(name: str, payload: bytes) -> None:
    head = frame_head(name, memoryview(payload))
    assert len(head) == head_bytes(name)
    assert is_intact(name, head, memoryview(payload))


@given(st.text(min_size=1, max_size=20), st.binary(min_size=1, max_size=60), st.data())
def test_any_flipped_bit_shows(name: str, payload: bytes, data: st.DataObject) -> None:
    head = frame_head(name, memoryview(payload))
    frame = bytearray(head + payload)
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    assert not is_intact(name, frame[: len(head)], memoryview(frame)[len(head) :])


def test_another_name_or_length_is_not_intact() -> None:
    head = frame_head("a/1", memoryview(b"payload"))
    assert not is_intact("a/2", head, memoryview(b"payload"))
    assert not is_intact("a/1", head, memoryview(b"payloa"))
    assert not is_intact("a/1", head[:-1], memoryview(b"payload"))


@pytest.mark.parametrize(("found", "count"), [([], 0), ([False], 0), ([True, False, True], 1), ([True, True], 2)])
def test_consecutive(found: list[bool], count: int) -> None:
    assert consecutive(found) == count
