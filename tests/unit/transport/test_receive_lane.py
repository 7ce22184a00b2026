"""Bytes of a data connection at the decode end: what is written, when not any more, and what is acknowledged."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.transport import receive_lane
from sglang_prfaas.transport.framing import ChunkHeader, Receipt, pack_chunk
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.receive_lane import Placement, ReceiveLane
from sglang_prfaas.transport.transfer import State
from sglang_prfaas.transport.vector import why_not_native
from tests.transport.rig import PAGES, Memory, layout
from tests.unit.transport.socket_end import SocketEnd

CHUNK_BYTES = 8192
PAGE_BYTES = 5000
"""Of buffer 1 of the pages."""
SLOT = 7
PAYLOAD = b"a" * PAGE_BYTES


class _Scattering:
    """A buffer whose items do not lie end to end: bytes are put together first, and scattered then."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self.item_bytes, self.slots = buffer.item_bytes, buffer.slots

    def views(self, *_: object) -> list[memoryview]:
        return []

    def scatter(self, *args: Any) -> None:
        self._buffer.scatter(*args)


class Rank:
    """A decode rank with one request of one page, and connections to it."""

    def __init__(self, *, staged: bool = False) -> None:
        of = layout()
        self.memory = Memory(of, None)
        if staged:
            pages: list[Any] = self.memory.rank.components[PAGES]
            pages[1] = _Scattering(pages[1])
        self.transfer = IncomingTransfer(9, 1, of, (1, 0, 0), VirtualClock(100.0))
        self.item = Placement(self.transfer, (np.array([SLOT]), np.array([], np.int64), np.array([], np.int64)))
        self.completed: list[IncomingTransfer] = []

    def lane(self) -> ReceiveLane:
        return ReceiveLane(
            self.memory.rank,
            CHUNK_BYTES,
            {1: self.item}.get,
            lambda transfer: self.completed.append(transfer),
            native=_way == "native",
        )

    @property
    def page(self) -> bytes:
        return bytes(self.memory.arrays[PAGES][1][SLOT])

    def fail(self) -> None:
        with self.transfer.lock:
            assert self.transfer.fail("the client has gone")


_way = ""
_pair: tuple[socket.socket, socket.socket]


@pytest.fixture(
    autouse=True,
    params=[
        "taken",
        "python",
        pytest.param("native", marks=pytest.mark.skipif(bool(why_not_native), reason=why_not_native)),
    ],
)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """How bytes come: as some that were received already, or from a socket."""
    global _way, _pair
    _way, _pair = request.param, socket.socketpair()
    yield
    for sock in _pair:
        sock.close()


def wire(payload: bytes = PAYLOAD) -> bytes:
    return pack_chunk(ChunkHeader(1, PAGES, 1, 0, len(payload)), payload)


def put(lane: ReceiveLane, data: bytes, between: Callable[[], None] | None = None) -> None:
    """Some bytes come; `between`: what happens when all of a chunk's are there, before they are looked at."""
    if between is None and _way == "taken":
        lane.take(memoryview(data))
        return
    if between is None:
        _pair[0].sendall(data)
        end, left = SocketEnd(_pair[1]), len(data)
        while left:
            left -= lane.fill(end) or 0
        return
    called, finish = between, lane._finish

    def late() -> None:
        called()
        finish()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane, "_finish", late)
        put(lane, data)


staged = pytest.mark.parametrize("staged", [False, True], ids=["in place", "scattered"])


@staged
def test_a_chunk_is_acknowledged_once_it_is_in_place(staged: bool) -> None:
    rank = Rank(staged=staged)
    lane, data = rank.lane(), wire()
    for at in range(0, len(data) - 1, 997):
        put(lane, data[at : min(at + 997, len(data) - 1)])
        assert lane.answers(idle=True) == b"", "an acknowledgement before the last byte"
    assert rank.transfer.bytes == 0
    put(lane, data[-1:])
    assert rank.page == PAYLOAD
    assert rank.transfer.bytes == PAGE_BYTES
    assert lane.answers(idle=True) == Receipt(1).pack()


def test_an_acknowledgement_in_the_middle_of_a_chunk_does_not_cover_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receive_lane, "ACK_BYTES", PAGE_BYTES)
    rank = Rank()
    lane = rank.lane()
    put(lane, wire())
    put(lane, wire()[:2000])
    assert lane.answers(idle=False) == Receipt(1).pack()
    put(lane, wire()[2000:])
    assert lane.answers(idle=False) == Receipt(2).pack()


@staged
def test_the_rest_of_a_chunk_whose_request_ends_is_drained(staged: bool) -> None:
    rank = Rank(staged=staged)
    lane, data = rank.lane(), wire()
    put(lane, data[:2000])
    rank.fail()
    before = rank.page
    put(lane, data[2000:])
    assert rank.page == before
    assert rank.transfer.bytes == 0
    assert lane.answers(idle=True) == Receipt(1).pack(), "nobody wants it: it is not asked for again"
    put(lane, wire())
    assert rank.page == before
    assert lane.answers(idle=True) == Receipt(2).pack()


@staged
def test_a_request_that_ends_between_the_last_byte_and_its_check_gets_nothing_more(staged: bool) -> None:
    rank = Rank(staged=staged)
    lane, data = rank.lane(), wire()
    put(lane, data[:2000])
    found: list[bytes] = []

    def ends() -> None:
        rank.fail()
        found.append(rank.page)

    put(lane, data[2000:], ends)
    assert [rank.page] == found
    assert (rank.transfer.state, rank.transfer.bytes) == (State.FAILED, 0)


@staged
def test_bytes_that_another_connection_has_taken_over_are_not_written_any_more(staged: bool) -> None:
    """The sender gave the first connection up; what is still on its way there may be anything."""
    rank = Rank(staged=staged)
    first, second = rank.lane(), rank.lane()
    stale = wire(b"b" * PAGE_BYTES)
    put(first, stale[:2000])
    put(second, wire())
    assert rank.page == PAYLOAD
    put(first, stale[2000:])
    assert rank.page == PAYLOAD
    assert rank.transfer.bytes == PAGE_BYTES
    assert first.answers(idle=True) == Receipt(0, again=True).pack() + Receipt(1).pack()
    put(first, stale)
    assert rank.page == PAYLOAD, "what is in place is not written again"
    assert rank.transfer.duplicate_bytes == PAGE_BYTES


@staged
def test_a_chunk_that_is_taken_over_before_its_check_does_not_count(staged: bool) -> None:
    rank = Rank(staged=staged)
    first, second = rank.lane(), rank.lane()
    put(first, wire(), lambda: put(second, wire()[:2000]))
    assert (rank.transfer.bytes, rank.completed) == (0, [])
    assert first.answers(idle=True) == Receipt(0, again=True).pack() + Receipt(1).pack()
    put(second, wire()[2000:])
    assert rank.transfer.bytes == PAGE_BYTES
    assert rank.page == PAYLOAD


@staged
def test_a_connection_that_is_lost_leaves_its_chunk_to_others(staged: bool) -> None:
    rank = Rank(staged=staged)
    first, second = rank.lane(), rank.lane()
    put(first, wire(b"b" * PAGE_BYTES)[:2000])
    first.lost()
    put(second, wire())
    assert rank.page == PAYLOAD
    rank.fail()  # hangs where a pin was forgotten
