"""Bytes of a data connection at the prefill end: what is sent of pages, and what once their request has ended."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.transport.framing import HEADER_BYTES, PayloadCheck, unpack_header
from sglang_prfaas.transport.messages import Expect
from sglang_prfaas.transport.outbox import Task, at_hand
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.send_lane import SendLane
from sglang_prfaas.transport.streams import ChunkSpan
from tests.transport.rig import DEADLINE_S, PAGES, Memory, layout

PAGE_BYTES = 5000
"""Of buffer 1 of the pages."""
SLOT = 7


class Rank:
    """A prefill rank with one request of one page, and a connection that is to send it."""

    def __init__(self) -> None:
        self.memory = Memory(layout(), 1)
        self.transfer = OutgoingTransfer(9, VirtualClock(100.0))
        with self.transfer.lock:
            assert self.transfer.expect(Expect(1, 9, (1, 0, 0), 0))
            self.transfer.start(1)
        self.failures: list[str] = []
        self.lane = SendLane(self.memory.rank, 1 << 16, lambda _, reason: self.failures.append(reason))

    @property
    def page(self) -> bytes:
        return bytes(self.memory.arrays[PAGES][1][SLOT])

    def add(self) -> bool:
        return self.lane.add(
            Task(self.transfer, ChunkSpan(PAGES, 1, 0, PAGE_BYTES), np.array([SLOT], np.int64), 0, at_hand)
        )

    def sent(self, most: int = 1 << 20) -> bytes:
        """What the connection would take, up to so many bytes."""
        found = b""
        while not self.lane.empty and len(found) < most:
            part = b"".join(self.lane.begin())[: most - len(found)]
            self.lane.end()
            self.lane.advance(len(part))
            found += part
        return found

    def fail(self) -> None:
        with self.transfer.lock:
            assert self.transfer.fail("the client has gone")


def holds(wire: bytes) -> bool:
    """Whether a chunk's checksum is right."""
    header = unpack_header(wire[:HEADER_BYTES])
    check = PayloadCheck(wire[:HEADER_BYTES], header.length)
    check.update([wire[HEADER_BYTES:]])
    return check.holds(header)


def test_a_chunk_is_its_header_and_its_page() -> None:
    rank = Rank()
    assert rank.add()
    wire = rank.sent()
    assert wire[HEADER_BYTES:] == rank.page
    assert holds(wire)


@pytest.mark.parametrize("before", [0, HEADER_BYTES, HEADER_BYTES + 2000])
def test_the_rest_of_a_chunk_whose_request_ends_is_zeros(before: int) -> None:
    """The connection needs as many bytes as the header says; what is in the pages now is another request's."""
    rank = Rank()
    assert rank.add()
    was = rank.page
    wire = rank.sent(before)
    rank.fail()
    rank.memory.arrays[PAGES][1][SLOT] = 0xEE
    wire += rank.sent()
    at = max(before, HEADER_BYTES)
    assert wire[HEADER_BYTES:at] == was[: at - HEADER_BYTES]
    assert wire[at:] == bytes(PAGE_BYTES - at + HEADER_BYTES)
    assert not holds(wire)


def test_a_request_does_not_end_while_its_pages_are_being_read() -> None:
    rank = Rank()
    assert rank.add()
    views = rank.lane.begin()
    ending = threading.Thread(target=rank.fail)
    ending.start()
    ending.join(0.05)
    assert ending.is_alive()
    assert rank.transfer.live
    assert b"".join(views)[HEADER_BYTES:] == rank.page
    rank.lane.end()
    ending.join(DEADLINE_S)
    assert not ending.is_alive()


def test_nothing_is_read_for_a_request_that_has_ended() -> None:
    rank = Rank()
    rank.fail()
    assert not rank.add()
    assert rank.lane.empty
    assert rank.failures == []
