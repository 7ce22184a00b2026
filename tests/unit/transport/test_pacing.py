"""The rate limit: bytes over time, whoever asks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.transport.pacing import MIN_CHUNK_BYTES, Pacer, paced_chunk_bytes


def test_no_limit_never_waits() -> None:
    pacer = Pacer(VirtualClock(), 0.0)
    assert [pacer.reserve(1 << 30) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert paced_chunk_bytes(1 << 20, 0.0) == 1 << 20


def test_a_chunk_takes_50_ms_at_most() -> None:
    assert paced_chunk_bytes(2 << 20, 100.0) == 625_000
    assert paced_chunk_bytes(2 << 20, 1000.0) == 2 << 20
    assert paced_chunk_bytes(2 << 20, 0.001) == MIN_CHUNK_BYTES


def test_nothing_is_saved_up() -> None:
    clock = VirtualClock()
    pacer = Pacer(clock, 1000.0)
    clock.advance(60.0)
    assert pacer.reserve(500) == 0.0
    assert pacer.reserve(500) == pytest.approx(0.5)
    assert pacer.reserve(500) == pytest.approx(1.0)


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0.0, 5.0)), min_size=1, max_size=50))
def test_the_rate_holds_from_any_chunk_to_any_later_one(chunks: list[tuple[int, float]]) -> None:
    clock = VirtualClock()
    pacer = Pacer(clock, 1000.0)
    left: list[tuple[float, int]] = []
    for nbytes, pause_s in chunks:
        left.append((clock.now_s() + pacer.reserve(nbytes), nbytes))
        clock.advance(pause_s)
    for i in range(len(left)):
        for j in range(i + 1, len(left)):
            between = sum(nbytes for _, nbytes in left[i:j])
            assert left[j][0] - left[i][0] >= between / 1000.0 - 1e-6


def test_chunks_are_short_under_a_limit() -> None:
    assert paced_chunk_bytes(1 << 20, 8.0) == 50_000
    assert paced_chunk_bytes(1 << 20, 0.001) == MIN_CHUNK_BYTES
    assert paced_chunk_bytes(1 << 20, 1e6) == 1 << 20
