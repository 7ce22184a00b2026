"""Gather and scatter, on host buffers and on torch tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.device_memory import TorchBuffer
from sglang_prfaas.transport.memory import Buffer, HostBuffer, RankMemory
from sglang_prfaas.transport.streams import cut

Array = npt.NDArray[np.uint8]


def host(array: Array) -> Buffer:
    return HostBuffer(array.ctypes.data, array.nbytes, array.shape[1])


def tensor(array: Array) -> Buffer:
    return TorchBuffer(torch.from_numpy(array))


@pytest.mark.parametrize("make_target", [host, tensor])
@pytest.mark.parametrize("make_source", [host, tensor])
def test_chunks_of_any_size_move_items_and_nothing_else(
    make_source: Callable[[Array], Buffer], make_target: Callable[[Array], Buffer]
) -> None:
    @given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 100), st.integers(0, 5))
    def check(item_bytes: int, items: int, chunk_bytes: int, first_item: int) -> None:
        rng = np.random.default_rng(item_bytes * 1000 + items)
        source = rng.integers(0, 256, (20, item_bytes), dtype=np.uint8)
        target = np.full((20, item_bytes), 7, np.uint8)
        from_slots = rng.permutation(20)[:items]
        to_slots = rng.permutation(20)[:items]
        send, receive = make_source(source), make_target(target)
        assert (send.slots, send.item_bytes) == (20, item_bytes)
        for span in cut(0, (item_bytes,), first_item, items, chunk_bytes):
            staging = np.full(span.length, 0xEE, np.uint8)
            send.gather(from_slots, first_item, span.offset, staging)
            receive.scatter(to_slots, first_item, span.offset, staging)
        np.testing.assert_array_equal(target[to_slots], source[from_slots])
        untouched = np.setdiff1d(np.arange(20), to_slots)
        assert (target[untouched] == 7).all()

    check()


@pytest.mark.parametrize("make", [host, tensor])
def test_ranges_that_cross_items_are_placed_too(make: Callable[[Array], Buffer]) -> None:
    source = np.arange(50, dtype=np.uint8).reshape(5, 10)
    slots = np.array([4, 0, 2])
    stream = source[slots].reshape(-1)
    for offset in range(30):
        for length in range(1, 31 - offset):
            out = np.zeros(length, np.uint8)
            make(source).gather(slots, 0, offset, out)
            np.testing.assert_array_equal(out, stream[offset : offset + length])
            target = np.zeros((5, 10), np.uint8)
            make(target).scatter(slots, 0, offset, out)
            got = target[slots].reshape(-1)
            np.testing.assert_array_equal(got[offset : offset + length], out)
            assert int(got.sum()) == int(out.sum())


def test_host_buffer_ignores_bytes_beyond_whole_items() -> None:
    array = np.zeros(105, np.uint8)
    assert HostBuffer(array.ctypes.data, 105, 10).slots == 10
    assert HostBuffer(array.ctypes.data, 105, 0).slots == 0


@pytest.fixture
def memory() -> RankMemory:
    arrays = [np.zeros((8, 4), np.uint8), np.zeros((6, 4), np.uint8)]
    empty = np.zeros(4, np.uint8)
    return RankMemory([[host(a) for a in arrays], [HostBuffer(empty.ctypes.data, 4, 0), host(arrays[0])]])


def test_indices_within_every_buffer_pass(memory: RankMemory) -> None:
    for dtype in (np.int32, np.int64, np.uint16):
        checked = memory.checked(0, np.array([[5, 0], [3, 1]], dtype))
        assert checked.dtype == np.int64
        assert checked.tolist() == [5, 0, 3, 1]
    assert memory.checked(0, []).tolist() == []
    assert memory.checked(1, [7]).tolist() == [7]


def test_checked_indices_do_not_change_with_the_callers_array(memory: RankMemory) -> None:
    given_indices = np.array([1, 2], np.int64)
    checked = memory.checked(0, given_indices)
    given_indices[:] = 1 << 40
    assert checked.tolist() == [1, 2]


@pytest.mark.parametrize("indices", [[6], [-1], [0, 1 << 40], np.array([1 << 63], np.uint64)])
def test_indices_outside_of_the_smallest_buffer_are_refused(memory: RankMemory, indices: npt.ArrayLike) -> None:
    with pytest.raises(LocalError, match="0 to 5 exist"):
        memory.checked(0, indices)


def test_indices_that_are_no_integers_are_refused(memory: RankMemory) -> None:
    with pytest.raises(LocalError, match="float64"):
        memory.checked(0, [1.5])


@pytest.mark.parametrize("component", [2, -1])
def test_a_component_that_does_not_exist_is_refused(memory: RankMemory, component: int) -> None:
    with pytest.raises(LocalError, match=f"component {component} does not exist"):
        memory.checked(component, [0])
