"""Chunks that must not be, corrupt ones, and memory that cannot be read or written."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from msgspec import Struct

from sglang_prfaas.transport.framing import Receipt
from sglang_prfaas.transport.messages import Abort
from sglang_prfaas.transport.receive_mover import Incoming
from sglang_prfaas.transport.transfer import State
from tests.transport.fakes import FakePrefill, at_end, chunk, read_exactly
from tests.transport.rig import ONE_CONNECTION, PAGES, Memory, Pair, flat, layout, some_slots, wait_ended


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GOOD = b"a" * 1000
ROW = some_slots(1, (1, 0, 0))


class Expecting(Struct):
    """A decode rank that expects one page from a prefill rank, which the test plays."""

    prefill: FakePrefill
    pair: Pair
    data: socket.socket
    """The prefill rank's end of the one data connection."""
    memory: Memory
    item: Incoming

    @property
    def page(self) -> npt.NDArray[np.uint8]:
        """Where the page belongs, as it is now."""
        return self.memory.arrays[PAGES][0][ROW[PAGES][0]]


@pytest.fixture
def decode() -> Iterator[Expecting]:
    memory = Memory(layout(), None)
    with FakePrefill() as prefill, Pair(config=ONE_CONNECTION, receive_memory=memory) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        (data,) = prefill.welcome()
        yield Expecting(prefill, pair, data, memory, pair.receiver.expect(session, 1, ROW, 0))


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (lambda i: chunk(i, PAGES, 0, 1000, GOOD), "ends at byte 2000 of a stream of 1000 bytes"),
        (lambda i: chunk(i, PAGES, 0, (1 << 64) - 1000, GOOD), "of a stream of 1000 bytes"),
        (lambda i: chunk(i, 9, 0, 0, GOOD), "component 9, buffer 0, which do not exist"),
        (lambda i: chunk(i, PAGES, 9, 0, GOOD), "component 0, buffer 9, which do not exist"),
        (lambda i: chunk(i, PAGES, 0, 0, b"a" * 4097), "chunk of 4097 bytes, expected 1 to 4096"),
    ],
)  # fmt: skip
def test_chunks_that_must_not_be_are_never_written(decode: Expecting, wire: Any, reason: str) -> None:
    one, two = decode.item.transfer, decode.pair.receiver.expect(decode.item.session, 2, ROW, 0).transfer
    before = decode.memory.copy()
    decode.data.sendall(wire(one.transfer_id))
    wait_ended(one, two)
    for transfer in (one, two):
        assert transfer.state is State.FAILED
        assert reason in transfer.reason
    for ours, theirs in zip(flat(decode.memory.arrays), flat(before), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert at_end(decode.data)
    assert {decode.prefill.receive(Abort).room, decode.prefill.receive(Abort).room} == {1, 2}


@pytest.mark.parametrize("at", [39, 40, 500, 1039])
def test_a_corrupt_chunk_is_asked_for_again(decode: Expecting, at: int) -> None:
    data, transfer = decode.data, decode.item.transfer
    good = chunk(transfer.transfer_id, PAGES, 0, 0, GOOD)
    data.sendall(flip(good, at))
    assert read_exactly(data, 32) == Receipt(0, again=True).pack() + Receipt(1).pack()
    assert (transfer.bytes, transfer.corrupt_chunks) == (0, 1)
    data.sendall(good)
    assert read_exactly(data, 16) == Receipt(2).pack()
    assert transfer.bytes == 1000
    assert decode.page.tobytes() == GOOD
    data.sendall(flip(good, at))
    assert read_exactly(data, 16) == Receipt(3).pack()
    assert decode.page.tobytes() == GOOD, "what is in place is not written over"


@pytest.mark.parametrize(
    "wire",
    [
        lambda i: flip(chunk(i, PAGES, 0, 0, GOOD), 25),
        lambda i: flip(chunk(i, PAGES, 0, 0, GOOD), 10),
        lambda i: b"GET / HTTP/1.1" + b" " * 40,
        lambda i: chunk(i, PAGES, 0, 0, GOOD)[:700],
    ],
)
def test_a_connection_that_makes_no_sense_is_dialled_again(decode: Expecting, wire: Any) -> None:
    transfer = decode.item.transfer
    decode.data.sendall(wire(transfer.transfer_id))
    if wire(1) == chunk(1, PAGES, 0, 0, GOOD)[:700]:
        decode.data.shutdown(socket.SHUT_WR)
    again = decode.prefill.accept(1)[0]
    assert transfer.bytes == 0
    again.sendall(chunk(transfer.transfer_id, PAGES, 0, 0, GOOD))
    assert read_exactly(again, 16) == Receipt(1).pack()
    assert transfer.bytes == 1000
    assert decode.item.session.health.reconnects == 1
    assert decode.page.tobytes() == GOOD


def test_memory_that_cannot_be_written() -> None:
    class Broken:
        item_bytes, slots = 1000, 64

        def gather(self, *_: object) -> None:
            raise ValueError("bad page")

        def views(self, *_: object) -> list[memoryview]:
            return []

        scatter = gather

    with Pair() as pair:
        slots = some_slots(1)
        broken: Any = Broken()
        pair.target.rank.components[PAGES][0] = broken
        transfer, item = pair.ready(7, slots)
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert "a chunk could not be placed: bad page" in item.transfer.reason
    with Pair() as pair:
        pair.source.rank.components[PAGES][0] = broken
        transfer, item = pair.ready(7, slots)
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert transfer.reason == "prefill could not read a chunk: bad page"
        assert item.transfer.reason == f"prefill gave the request up: {transfer.reason}"
