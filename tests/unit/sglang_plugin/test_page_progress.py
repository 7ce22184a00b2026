"""Pages that go ahead of SGLang's chunks: every page of every buffer once, and read where it lies."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.sglang_plugin.page_progress import PageProgress


def test_a_chunk_without_layers_ahead_goes_to_all_buffers() -> None:
    progress = PageProgress(3)
    progress.hand_over(np.arange(4))
    assert progress.due(4) == [(0, [0, 1, 2])]
    assert progress.due(4) == []
    progress.hand_over(np.arange(2))
    assert progress.handed_over == 6
    assert progress.due(6) == [(4, [0, 1, 2])]


def test_what_went_ahead_is_left_out() -> None:
    progress = PageProgress(3)
    assert progress.due(4, [1]) == [(0, [1])]
    progress.hand_over(np.arange(6))
    assert progress.due(6) == [(0, [0, 2]), (4, [1])]


def test_pages_that_moved_are_read_where_they_are() -> None:
    progress = PageProgress(1)
    first, second = np.array([10, 11, 12]), np.array([13, 14])
    progress.due(3, [0])
    progress.ran_ahead(0, first)
    progress.due(5, [0])
    progress.ran_ahead(3, second)
    progress.hand_over(np.array([20, 11]))
    assert first.tolist() == [20, 11, 12]
    progress.hand_over(np.array([32, 13, 34]))
    assert (first.tolist(), second.tolist()) == ([20, 11, 32], [13, 34])
    progress.hand_over(np.array([99]))
    assert (first.tolist(), second.tolist()) == ([20, 11, 32], [13, 34])


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.lists(st.integers(0, 3), max_size=6), st.integers(0, 5)),
        min_size=1,
        max_size=6,
    )
)
def test_every_page_of_every_buffer_goes_once_and_is_read_at_its_last_place(
    chunks: list[tuple[int, list[int], int]],
) -> None:
    """Chunks of so many pages, of which some layers go ahead, up to so many pages."""
    progress = PageProgress(4)
    final: list[int] = []
    read: dict[tuple[int, int], tuple[np.ndarray, int]] = {}

    def queue(first: int, stop: int, buffers: list[int], slots: np.ndarray) -> None:
        for buffer in buffers:
            for item in range(first, stop):
                assert (buffer, item) not in read
                read[buffer, item] = (slots, item - first)

    for number, (pages, layers, ahead) in enumerate(chunks):
        start = progress.handed_over
        early = np.arange(start, start + min(ahead, pages)) + 1000
        for layer in layers:
            for first, buffers in progress.due(start + len(early), [layer]):
                slots = early[first - start :].copy()
                progress.ran_ahead(first, slots)
                queue(first, start + len(early), buffers, slots)
        moved = np.arange(start, start + pages) + (1000 if number % 2 else 2000)
        final += moved.tolist()
        progress.hand_over(moved)
        for first, buffers in progress.due(start + pages):
            queue(first, start + pages, buffers, moved[first - start :])
    assert set(read) == {(buffer, item) for buffer in range(4) for item in range(len(final))}
    for (_, item), (slots, at) in read.items():
        assert slots[at] == final[item]
