"""Chunks that wait, fly, come back and are acknowledged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.outbox import Lane, Outbox, Task
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.sharing import ShortestFirst
from sglang_prfaas.transport.streams import ChunkSpan


def tasks(transfer: OutgoingTransfer, *offsets: int, length: int = 1) -> list[Task]:
    nothing = np.empty(0, np.int64)
    return [Task(transfer, ChunkSpan(0, 0, at, length), nothing, 0, lambda: None) for at in offsets]


def taken(outbox: Outbox, lane: Lane) -> list[tuple[int, int]]:
    """Everything that waits, as (room, offset)."""
    found = []
    while (task := outbox.take(lane)) is not None:
        found.append((task.transfer.room, task.span.offset))
    return found


def transfer(room: int) -> OutgoingTransfer:
    return OutgoingTransfer(room, VirtualClock())


def test_a_small_transfer_passes_a_large_one() -> None:
    outbox, lane, large, small = Outbox(), Lane(0), transfer(1), transfer(2)
    outbox.put(large, tasks(large, 0, 10, 20, length=10), 30, 0.0)
    assert outbox.take(lane) is not None
    outbox.put(small, tasks(small, 0, length=10), 10, 0.0)
    assert taken(outbox, lane) == [(2, 0), (1, 10), (1, 20)]


def test_a_large_transfer_is_not_put_off_for_ever() -> None:
    outbox, lane, large = Outbox(ShortestFirst(ageing_bytes_per_s=100.0)), Lane(0), transfer(0)
    outbox.put(large, tasks(large, *range(5), length=100), 500, 0.0)
    order = []
    for second in range(1, 12):
        small = transfer(second)
        outbox.put(small, tasks(small, 0, length=1), 1, float(second))
        task = outbox.take(lane)
        assert task is not None
        order.append(task.transfer.room)
    assert order[:4] == [1, 2, 3, 4]
    assert order.count(0) == 5, "after five seconds of waiting it has its turn"


def test_idle_connections_take_from_one_queue() -> None:
    outbox, lanes, one = Outbox(), [Lane(i) for i in range(3)], transfer(1)
    outbox.put(one, tasks(one, *range(6)), 6, 0.0)
    assert [outbox.take(lanes[i]).span.offset for i in (0, 1, 1, 2, 1, 0)] == list(range(6))  # type: ignore[union-attr]
    assert [len(lane.flying) for lane in lanes] == [2, 3, 1]


def test_a_lost_connection_gives_back_what_was_not_acknowledged() -> None:
    outbox, bad, good, one = Outbox(), Lane(0), Lane(1), transfer(1)
    outbox.put(one, tasks(one, *range(5)), 5, 0.0)
    for _ in range(4):
        outbox.take(bad)
    assert [task.span.offset for task in outbox.acknowledged(bad, 2)] == [0, 1]
    assert outbox.lose(bad) == 2
    assert outbox.lose(bad) == 0
    assert taken(outbox, good) == [(1, 2), (1, 3), (1, 4)]
    assert [task.attempts for task in good.flying if task] == [2, 2, 1]


def test_a_corrupt_chunk_goes_again_and_its_acknowledgement_is_not_believed() -> None:
    outbox, lane, one = Outbox(), Lane(0), transfer(1)
    outbox.put(one, tasks(one, *range(3)), 3, 0.0)
    taken(outbox, lane)
    task = outbox.again(lane, 1)
    assert task is not None
    assert task.span.offset == 1
    assert outbox.again(lane, 1) is None
    assert [task.span.offset for task in outbox.acknowledged(lane, 3)] == [0, 2]
    assert taken(outbox, lane) == [(1, 1)]
    assert [task.span.offset for task in outbox.acknowledged(lane, 4)] == [1]


@pytest.mark.parametrize("number", [4, 1 << 40])
def test_receipts_for_what_was_never_sent(number: int) -> None:
    outbox, lane, one = Outbox(), Lane(0), transfer(1)
    outbox.put(one, tasks(one, *range(3)), 3, 0.0)
    taken(outbox, lane)
    for receipt in (outbox.acknowledged, outbox.again):
        with pytest.raises(ProtocolError):
            receipt(lane, number)
    outbox.acknowledged(lane, 2)
    with pytest.raises(ProtocolError):
        outbox.acknowledged(lane, 1)


def test_what_has_ended_is_neither_sent_nor_sent_again() -> None:
    outbox, lane, one, two = Outbox(), Lane(0), transfer(1), transfer(2)
    outbox.put(one, tasks(one, 0, 1), 2, 0.0)
    outbox.put(two, tasks(two, 0), 1, 0.0)
    assert outbox.take(lane) is not None
    outbox.take(lane)
    one.fail("over")
    outbox.drop(one)
    two.fail("over")
    outbox.lose(lane)
    assert (taken(outbox, lane), outbox.count) == ([], 0)


@given(st.data())
def test_every_chunk_is_delivered_whatever_is_lost(data: st.DataObject) -> None:
    """Random takes, acknowledgements, losses and repeats: nothing is forgotten, nothing acknowledged twice."""
    outbox, lanes = Outbox(), [Lane(i) for i in range(3)]
    transfers = [transfer(room) for room in range(3)]
    for one in transfers:
        outbox.put(one, tasks(one, *range(4)), 4, float(one.room))
    delivered: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(0, 60))):
        at = data.draw(st.integers(0, 2))
        lane = lanes[at]
        match data.draw(st.sampled_from(["take", "ack", "again", "lose"])):
            case "take":
                outbox.take(lane)
            case "ack" if lane.flying:
                number = lane.first + data.draw(st.integers(0, len(lane.flying)))
                delivered += [(t.transfer.room, t.span.offset) for t in outbox.acknowledged(lane, number)]
            case "again" if lane.flying:
                outbox.again(lane, lane.first + data.draw(st.integers(0, len(lane.flying) - 1)))
            case "lose":
                outbox.lose(lane)
                lanes[at] = Lane(at)
            case _:
                pass
    for lane in lanes:
        number = lane.first + len(lane.flying)
        delivered += [(t.transfer.room, t.span.offset) for t in outbox.acknowledged(lane, number)]
    delivered += taken(outbox, Lane(9))
    assert sorted(delivered) == [(room, offset) for room in range(3) for offset in range(4)]
    assert outbox.count == 0
