"""A batch of chunks from its pages to a sink, and on into a receiving lane."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.transport import memory, send_lane, vector
from sglang_prfaas.transport.framing import HEADER_BYTES, Receipt, ReceiptReader
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.messages import Expect
from sglang_prfaas.transport.outbox import Task, at_hand
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.receive_lane import Placement, ReceiveLane
from sglang_prfaas.transport.send_lane import SendLane
from sglang_prfaas.transport.streams import cut
from sglang_prfaas.transport.transfer import State
from tests.transport.rig import DEADLINE_S, Memory, Slots, layout, some_slots

CHUNK_BYTES = 8192
PIECE_BYTES = 2100
"""Not a multiple of any item: pieces end within items."""


class Sink:
    """Takes so many bytes in all; with `rng`, not as many at a time as it is given."""

    def __init__(self, nbytes: int = 1 << 30, *, rng: random.Random | None = None) -> None:
        self.data = bytearray()
        self._room_bytes = nbytes
        self._rng = rng

    def send(self, views: list[memoryview], *, more: bool = False) -> int:
        limit = self._room_bytes
        if self._rng is not None:
            limit = min(limit, self._rng.choice((0, 1, 39, 1000, 5000, 1 << 20)))
        data = b"".join(views)[:limit]
        self.data += data
        self._room_bytes -= len(data)
        return len(data)

    def send_with(self, act: Callable[[int], int]) -> int:
        raise AssertionError("there is no descriptor")


class SocketSink(Sink):
    """The same with a descriptor, which takes a few pieces at a time. The last may be more than there was room for."""

    def __init__(self, nbytes: int = 1 << 30, *, rng: random.Random | None = None) -> None:
        super().__init__(nbytes, rng=rng)
        self.ends = socket.socketpair()
        for end in self.ends:
            end.setblocking(False)
        self.ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def send_with(self, act: Callable[[int], int]) -> int:
        if self._room_bytes <= 0 or (self._rng is not None and self._rng.random() < 0.3):
            return 0
        sent = act(self.ends[0].fileno())
        for _ in range(sent):
            self.data += self.ends[1].recv(1)
        self._room_bytes -= sent
        return sent


MakeSink = Callable[..., Sink]


@pytest.fixture(params=["python", "native"])
def make_sink(request: pytest.FixtureRequest) -> Iterator[MakeSink]:
    made: list[SocketSink] = []

    def make(nbytes: int = 1 << 30, *, rng: random.Random | None = None) -> Sink:
        if request.param != "native":
            return Sink(nbytes, rng=rng)
        made.append(SocketSink(nbytes, rng=rng))
        return made[-1]

    if request.param == "native" and vector.why_not_native:
        pytest.skip(vector.why_not_native)
    yield make
    for sink in made:
        for end in sink.ends:
            end.close()


class Case:
    """One transfer at both ends, and what was asked for again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int = 5, transfer_id: int = 1) -> None:
        monkeypatch.setattr(vector, "SEND_BYTES", PIECE_BYTES)
        monkeypatch.setattr(vector, "RECEIVE_BYTES", 1900)
        monkeypatch.setattr(vector, "NATIVE_SEND_BYTES", 700)
        monkeypatch.setattr(send_lane, "BEFORE_BYTES", 100)
        monkeypatch.setattr(send_lane, "SMALL_BYTES", 1024)
        monkeypatch.setattr(memory, "MIN_VIEW_BYTES", 100)
        self.layout, clock = layout(), MonotonicClock()
        self.source, self.target = Memory(self.layout, seed), Memory(self.layout, None)
        self.slots, self.places = some_slots(seed), some_slots(seed + 1)
        counts = tuple(map(len, self.slots))
        self.outgoing = OutgoingTransfer(7, clock)
        self.outgoing.expect(Expect(transfer_id, 7, counts, 0))
        self.outgoing.start(counts[0])
        self.incoming = IncomingTransfer(7, transfer_id, self.layout, counts, clock)
        self.failures: list[str] = []
        self.sending = SendLane(self.source.rank, CHUNK_BYTES, lambda _, why: self.failures.append(why))
        self.found = {transfer_id: Placement(self.incoming, tuple(self.places))}
        self.receiving = ReceiveLane(self.target.rank, CHUNK_BYTES, self.found.get, lambda _: None)
        self.tasks = [
            Task(self.outgoing, span, slots, 0, at_hand)
            for component, slots in enumerate(self.slots)
            for span in cut(component, self.layout.components[component].item_bytes, 0, len(slots), CHUNK_BYTES)
        ]

    def batch(self, tasks: list[Task], sink: Sink, *, copy: bool = False) -> None:
        self.sending.reset()
        self.sending.native = isinstance(sink, SocketSink)
        for task in tasks:
            assert self.sending.add(task, copy=copy)

    def again(self, data: bytes) -> list[int]:
        """Which chunks of the connection decode asks for again."""
        self.receiving.take(memoryview(data))
        receipts = ReceiptReader().feed(self.receiving.answers(idle=True))
        assert receipts[-1] == Receipt(receipts[-1].number), "all before it are dealt with"
        return [receipt.number for receipt in receipts if receipt.again]

    def equal(self, slots: Slots | None = None) -> bool:
        return all(
            bool((target[there] == source[here]).all())
            for sources, targets, here, there in zip(
                self.source.arrays, self.target.arrays, slots or self.slots, self.places, strict=True
            )
            for source, target in zip(sources, targets, strict=True)
        )


@pytest.mark.parametrize("seed", range(8))
def test_every_byte_arrives_however_little_the_sink_takes(
    monkeypatch: pytest.MonkeyPatch, seed: int, make_sink: MakeSink
) -> None:
    case, rng = Case(monkeypatch, seed), random.Random(seed)
    sink = make_sink(rng=rng)
    left = case.tasks
    while left:
        count = rng.randrange(1, 5)
        case.batch(left[:count], sink, copy=rng.random() < 0.2)
        left = left[count:]
        while not case.sending.push(sink):
            assert case.outgoing._pins == 0, "pages are held while nothing is sent"
    assert case.again(bytes(sink.data)) == []
    assert case.incoming.state is State.DONE
    assert case.equal()
    assert not case.failures


def _moved(case: Case) -> None:
    """All items move to other slots, and what they leave is written over, as SGLang's radix cache may have it."""
    for slots, arrays in zip(case.slots, case.source.arrays, strict=True):
        free = np.setdiff1d(np.arange(len(arrays[0])), slots)[: len(slots)]
        for array in arrays:
            array[free] = array[slots[: len(free)]]
            array[slots[: len(free)]] ^= 0xFF
        slots[: len(free)] = free
    case.outgoing.moves += 1


@pytest.mark.parametrize("sent", [0, 1, HEADER_BYTES, 1000, HEADER_BYTES + 2000, 5000])
def test_what_moved_before_it_left_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, sent: int, make_sink: MakeSink
) -> None:
    """Nothing that was written to the old slots passes for the request's bytes."""
    case = Case(monkeypatch)
    task = next(task for task in case.tasks if task.span.length > 6000)
    sink = make_sink(sent)
    case.batch([task], sink)
    case.sending.push(sink)
    assert sent <= len(sink.data) < HEADER_BYTES + task.span.length
    _moved(case)
    rest = make_sink()
    assert case.sending.push(rest)
    assert case.again(bytes(sink.data + rest.data)) == [0]
    assert case.incoming.bytes == 0
    whole = make_sink()
    case.batch(case.tasks, whole)
    assert case.sending.push(whole)
    assert case.again(bytes(whole.data)) == []
    assert case.equal()


@pytest.mark.parametrize("sent", [0, 20, 1000, 4000])
def test_a_transfer_that_ends_leaves_zeros_and_the_next_one_whole(
    monkeypatch: pytest.MonkeyPatch, sent: int, make_sink: MakeSink
) -> None:
    case, other = Case(monkeypatch), Case(monkeypatch, 6, transfer_id=2)
    task = next(task for task in case.tasks if task.span.length > 6000)
    follows = next(task for task in other.tasks if task.span.length > 6000)
    sink = make_sink(sent)
    case.batch([task], sink)
    case.sending._memory = other.source.rank
    assert case.sending.add(follows)
    case.sending.push(sink)
    with case.outgoing.lock:
        case.outgoing.fail("the client has gone")  # hangs where a pin was forgotten
    for arrays in case.source.arrays:
        for array in arrays:
            array[:] = 0x5A
    left = len(sink.data)
    rest = make_sink()
    assert case.sending.push(rest)
    data = bytes(sink.data + rest.data)
    size = HEADER_BYTES + task.span.length
    assert set(data[max(left, HEADER_BYTES) : size]) == {0}
    case.found.update(other.found)
    assert case.again(data) == [0]
    assert (case.incoming.bytes, other.incoming.bytes) == (0, follows.span.length)


def test_memory_that_cannot_be_read_ends_its_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)

    def broken(_task: Task) -> None:
        raise RuntimeError("the device is gone")

    task = Task(case.outgoing, case.tasks[0].span, case.tasks[0].indices, 0, partial(broken, case.tasks[0]))
    case.sending.reset()
    assert not case.sending.add(task)
    assert case.sending.empty
    assert case.failures == ["prefill could not read a chunk: the device is gone"]


def test_a_request_does_not_end_while_its_pages_are_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    task = next(task for task in case.tasks if task.span.length > 6000)
    case.batch([task], Sink())

    def end() -> None:
        with case.outgoing.lock:
            case.outgoing.fail("the client has gone")

    ending = threading.Thread(target=end)

    class Slow(Sink):
        def send(self, views: list[memoryview], *, more: bool = False) -> int:
            if not self.data:
                ending.start()
                ending.join(0.05)
                assert ending.is_alive()
            return super().send(views, more=more)

    sink = Slow()
    assert case.sending.push(sink)
    ending.join(DEADLINE_S)
    assert not ending.is_alive()
    assert case.again(bytes(sink.data)) == [], "all of it was read before the end"


def test_nothing_is_read_for_a_request_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(monkeypatch)
    with case.outgoing.lock:
        case.outgoing.fail("the client has gone")
    assert not case.sending.add(case.tasks[0])
    assert case.sending.empty
    assert case.failures == []
