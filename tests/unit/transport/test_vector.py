"""A payload's bytes through a socket, in Python and natively."""

from __future__ import annotations

import gc
import random
import shutil
import socket
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from sglang_prfaas.transport import vector
from sglang_prfaas.transport.memory import Bytes, HostBuffer, Indices
from sglang_prfaas.transport.vector import Vector, of_bytes, of_items
from tests.unit.transport.socket_end import SocketEnd

SLOTS, ITEM_BYTES, SEED = 64, 300, 77
FRAME_BYTES = 40

kinds = pytest.mark.parametrize(
    "native",
    [False, pytest.param(True, marks=pytest.mark.skipif(bool(vector.why_not_native), reason=vector.why_not_native))],
    ids=["python", "native"],
)


@pytest.fixture
def ends() -> Iterator[tuple[SocketEnd, SocketEnd]]:
    pair = socket.socketpair()
    yield SocketEnd(pair[0]), SocketEnd(pair[1])
    for sock in pair:
        sock.close()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that end within items."""
    sizes = {"SEND_BYTES": 1100, "RECEIVE_BYTES": 700, "NATIVE_SEND_BYTES": 900, "NATIVE_RECEIVE_BYTES": 800}
    for name, nbytes in sizes.items():
        monkeypatch.setattr(vector, name, nbytes)
    monkeypatch.setattr("sglang_prfaas.transport.memory.MIN_VIEW_BYTES", 1)


def memory(seed: int | None) -> tuple[Bytes, HostBuffer]:
    flat = np.zeros(SLOTS * ITEM_BYTES, np.uint8)
    if seed is not None:
        flat[:] = np.random.default_rng(seed).integers(0, 256, len(flat), np.uint8)
    return flat, HostBuffer(flat.ctypes.data, flat.nbytes, ITEM_BYTES)


def some_rows(rng: random.Random) -> Indices:
    """Slots in random order, some next to each other."""
    rows: list[int] = []
    for first in rng.sample(range(0, SLOTS, 4), rng.randrange(2, 12)):
        rows += range(first, first + rng.randrange(1, 5))
    return np.array(rows, np.int64)


def stream(flat: Bytes, rows: Indices) -> bytes:
    return flat.reshape(SLOTS, ITEM_BYTES)[rows].tobytes()


def checksum(data: bytes) -> int:
    result: int = xxhash.xxh3_64_intdigest(data, seed=SEED)
    return result


def lying(buffer: HostBuffer, rows: Indices, offset: int, nbytes: int, *, native: bool, seed: int = SEED) -> Vector:
    found = of_items(buffer, rows[offset // ITEM_BYTES :], offset // ITEM_BYTES, offset, nbytes, seed, native=native)
    assert found is not None
    return found


@kinds
@pytest.mark.parametrize("seed", range(20))
def test_what_is_pushed_is_pulled_however_little_the_socket_takes(
    ends: tuple[SocketEnd, SocketEnd], native: bool, seed: int
) -> None:
    rng = random.Random(seed)
    (source, sender), (target, receiver) = memory(seed), memory(None)
    here, there = some_rows(rng), some_rows(rng)
    nbytes = rng.randrange(1, min(len(here), len(there)) * ITEM_BYTES)
    offset, place = (rng.randrange(len(rows) * ITEM_BYTES - nbytes + 1) for rows in (here, there))
    sent = lying(sender, here, offset, nbytes, native=native)
    got = lying(receiver, there, place, nbytes, native=native)
    before, frame = memoryview(rng.randbytes(FRAME_BYTES)), memoryview(bytearray(FRAME_BYTES))
    after, trailing = memoryview(rng.randbytes(8)), memoryview(bytearray(8))
    head, tail, framed = before, after, 0
    assert ends[1].receive([frame]) is None
    while framed < FRAME_BYTES + 8:
        if sent.nbytes:
            was = sent.nbytes
            count = sent.push(ends[0], [head] if head else [])
            assert count <= len(head) + was
            assert sent.nbytes == was - max(0, count - len(head)), "what is left is counted"
            head = head[count:]
        elif tail:
            tail = tail[ends[0].send([tail]) :]
        if framed < FRAME_BYTES:
            framed += ends[1].receive([frame[framed:]]) or 0
        else:
            was = got.nbytes
            came = got.pull(ends[1], trailing[framed - FRAME_BYTES :])
            assert came is None or came >= was - got.nbytes
            framed += (came or 0) - (was - got.nbytes)
    assert (bytes(frame), bytes(trailing)) == (bytes(before), bytes(after))
    expected = stream(source, here)[offset : offset + nbytes]
    assert stream(target, there)[place : place + nbytes] == expected
    assert sent.digest() == got.digest() == checksum(expected)
    untouched = np.setdiff1d(np.arange(SLOTS), there)
    assert not target.reshape(SLOTS, ITEM_BYTES)[untouched].any()
    assert not np.frombuffer(stream(target, there)[:place] + stream(target, there)[place + nbytes :], np.uint8).any()


@kinds
def test_bytes_that_came_already_are_put_in_place(native: bool) -> None:
    rng = random.Random(3)
    (source, _), (target, receiver) = memory(3), memory(None)
    rows = some_rows(rng)
    data = stream(source, rows)
    got = lying(receiver, rows, 0, len(data), native=native)
    rest = memoryview(data + b"next")
    while got.nbytes:
        count = got.put(rest[: rng.randrange(1, 800)])
        assert count
        rest = rest[count:]
    assert got.put(rest) == 0
    assert stream(target, rows) == data
    assert got.digest() == checksum(data)


@kinds
def test_the_end_of_a_connection_and_its_loss(ends: tuple[SocketEnd, SocketEnd], native: bool) -> None:
    frame = memoryview(bytearray(8))
    got = of_bytes(memoryview(bytearray(5000)), None, native=native)
    assert got.pull(ends[1], frame) is None
    ends[0].sock.send(b"last")
    ends[0].sock.close()
    assert got.pull(ends[1], frame) == 4
    assert got.pull(ends[1], frame) == 0
    with pytest.raises(BrokenPipeError):
        of_bytes(memoryview(bytes(5000)), SEED, native=native).push(ends[1], [])
    with pytest.raises(RuntimeError, match="no checksum"):
        got.digest()


def test_small_items_are_left_to_be_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    _, buffer = memory(1)
    monkeypatch.setattr("sglang_prfaas.transport.memory.MIN_VIEW_BYTES", ITEM_BYTES + 1)
    rows = np.arange(0, SLOTS, 2)
    for native in (False, True):
        assert of_items(buffer, rows, 0, 0, 4 * ITEM_BYTES, SEED, native=native) is None


@pytest.mark.skipif(
    not (shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists()),
    reason="no compiler, or no headers of Python",
)
def test_vectors_are_native_where_there_is_a_compiler() -> None:
    assert vector.why_not_native == ""


@pytest.mark.skipif(bool(vector.why_not_native), reason=vector.why_not_native)
class TestNative:
    def test_more_places_than_one_call_takes(
        self, ends: tuple[SocketEnd, SocketEnd], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(vector, "NATIVE_SEND_BYTES", 1 << 20)
        monkeypatch.setattr(vector, "NATIVE_RECEIVE_BYTES", 1 << 20)
        ends[0].sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        source = np.random.default_rng(1).integers(0, 256, 5000 * 16, np.uint8)
        target = np.zeros_like(source)
        orders = [np.random.default_rng(seed).permutation(5000) for seed in (1, 2)]
        sent, got = (
            of_items(HostBuffer(a.ctypes.data, a.nbytes, 16), order, 0, 0, a.nbytes, SEED, native=True)
            for a, order in zip((source, target), orders, strict=True)
        )
        assert sent is not None
        assert got is not None
        head, frame = memoryview(b"head"), memoryview(bytearray(4))
        while got.nbytes:
            if sent.nbytes:
                count = sent.push(ends[0], [head] if head else [])
                head = head[count:]
            if frame:
                frame = frame[ends[1].receive([frame]) or 0 :]
            else:
                got.pull(ends[1], memoryview(bytearray(1)))
        rows = source.reshape(-1, 16)[orders[0]]
        assert (target.reshape(-1, 16)[orders[1]] == rows).all()
        assert sent.digest() == got.digest() == checksum(rows.tobytes())

    def test_a_checksum_of_many_parts(self) -> None:
        rng = random.Random(4)
        data = memoryview(rng.randbytes(3000))
        for length in range(1, len(data), 97):
            got, at = of_bytes(memoryview(bytearray(length)), SEED, native=True), 0
            while at < length:
                at += got.put(data[at : min(length, at + rng.randrange(1, 300))])
            assert got.digest() == checksum(bytes(data[:length]))

    def test_slots_are_a_vector_of_64_bits(self) -> None:
        from sglang_prfaas.transport._vectored import Vector

        flat = np.zeros(1000, np.uint8)
        for rows in (np.zeros(2, np.int32), np.arange(4)[::2]):
            with pytest.raises(ValueError, match=r"slots|contiguous"):
                Vector(flat, rows, 100, 0, 200)

    def test_a_piece_has_bytes(self, ends: tuple[SocketEnd, SocketEnd]) -> None:
        from sglang_prfaas.transport._vectored import Vector

        one = Vector(bytearray(100), np.zeros(1, np.int64), 100, 0, 100)
        for nbytes in (0, -1):
            with pytest.raises(ValueError, match="pieces of"):
                one.send(ends[0].sock.fileno(), b"", nbytes)
            with pytest.raises(ValueError, match="pieces of"):
                one.receive(ends[1].sock.fileno(), memoryview(bytearray(1)), nbytes)

    def test_nothing_outside_of_the_memory_is_touched(self) -> None:
        from sglang_prfaas.transport._vectored import Vector

        flat = np.zeros(1000, np.uint8)
        for rows, start, nbytes in (([10], 0, 100), ([-1], 0, 100), ([1 << 60], 0, 1), ([0, 10], 50, 60)):
            with pytest.raises(ValueError, match="a slot outside of memory of 1000 bytes"):
                Vector(flat, np.array(rows, np.int64), 100, start, nbytes)
        for rows, start, nbytes in (([1], 0, 101), ([1, 2], 0, 100), ([], 0, 1)):
            with pytest.raises(ValueError, match="bytes of slots, expected"):
                Vector(flat, np.array(rows, np.int64), 100, start, nbytes)
        for size, start, nbytes in ((0, 0, 1), (-1, 0, 1), (100, 100, 1), (100, -1, 1), (100, 0, 0), (100, 0, 1 << 63)):
            with pytest.raises((ValueError, OverflowError)):
                Vector(flat, np.zeros(1, np.int64), size, start, nbytes)
        assert Vector(flat, np.array([9], np.int64), 100, 99, 1).nbytes == 1

    def test_memory_that_is_only_to_be_read_is_not_written_to(self, ends: tuple[SocketEnd, SocketEnd]) -> None:
        got = of_bytes(memoryview(bytes(100)), None, native=True)
        ends[0].sock.send(b"x" * 100)
        with pytest.raises(TypeError, match="only to be read"):
            got.pull(ends[1], memoryview(bytearray(8)))
        with pytest.raises(TypeError, match="only to be read"):
            got.put(memoryview(b"x"))
        assert got.nbytes == 100

    def test_memory_is_held_as_long_as_the_vector(self) -> None:
        data = bytearray(100)
        held = of_bytes(memoryview(data), SEED, native=True)
        with pytest.raises(BufferError):
            data.extend(b"longer")
        del held
        gc.collect()
        data.extend(b"longer")
        assert sys.getrefcount(data) == 2

    def test_a_seed_is_a_number_of_64_bits(self) -> None:
        data = memoryview(bytearray(10))
        for seed in (-1, 1 << 64):
            with pytest.raises(OverflowError):
                of_bytes(data, seed, native=True)
        assert of_bytes(data, (1 << 64) - 1, native=True).nbytes == 10
