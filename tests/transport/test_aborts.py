"""Requests that one side gives up, in the middle or before they began."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_prfaas.transport.messages import Abort
from sglang_prfaas.transport.transfer import State
from tests.transport.fakes import FakePrefill, chunk
from tests.transport.rig import (
    ONE_CONNECTION,
    PAGES,
    Memory,
    Pair,
    flat,
    layout,
    some_slots,
    wait_ended,
    wait_until,
    works,
)


def test_decode_aborts_in_the_middle() -> None:
    with Pair() as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES][:10])
        wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
        pair.receiver.abort(item, "client gone")
        after = pair.target.copy()
        pair.sender.send(transfer, PAGES, 10, slots[PAGES][10:])
        wait_ended(transfer)
        assert transfer.reason == "decode ended the request: client gone"
        assert item.transfer.reason == "client gone"
        pair.receiver.release(item)
        pair.sender.release(transfer)
        works(pair, 8)  # over the same connections, to other pages as well: only those may have changed
        touched = some_slots(8)
        for component, buffers in enumerate(pair.target.arrays):
            for buffer, was in zip(buffers, after[component], strict=True):
                rest = np.setdiff1d(np.arange(len(buffer)), touched[component])
                np.testing.assert_array_equal(buffer[rest], was[rest])


@pytest.mark.parametrize("released", [False, True])
def test_late_chunks_of_an_ended_request_are_dropped(released: bool) -> None:
    memory = Memory(layout(), None)
    with FakePrefill() as prefill, Pair(config=ONE_CONNECTION, receive_memory=memory) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        (data,) = prefill.welcome()
        wait_until(lambda: session.up, "session up")
        one = pair.receiver.expect(session, 1, some_slots(1, (1, 0, 0)), 0)
        two = pair.receiver.expect(session, 2, some_slots(2, (1, 0, 0)), 0)
        data.sendall(chunk(one.transfer.transfer_id, PAGES, 0, 0, b"a" * 1000))
        wait_until(lambda: one.transfer.bytes == 1000, "first chunk")
        if released:
            pair.receiver.release(one)
        else:
            pair.receiver.abort(one, "client gone")
        before = memory.copy()
        data.sendall(chunk(one.transfer.transfer_id, PAGES, 0, 0, b"b" * 1000))
        data.sendall(chunk(one.transfer.transfer_id, PAGES, 1, 0, b"b" * 4096))
        data.sendall(chunk(999, PAGES, 1, 0, b"b" * 4096))
        data.sendall(chunk(two.transfer.transfer_id, PAGES, 0, 0, b"c" * 1000))
        wait_until(lambda: two.transfer.bytes == 1000, "the chunk after the late ones")
        row = some_slots(2, (1, 0, 0))[PAGES]
        before[PAGES][0][row] = ord("c")
        for ours, theirs in zip(flat(memory.arrays), flat(before), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert prefill.receive(Abort).room == 1


@pytest.mark.parametrize("released", [False, True])
def test_the_rest_of_a_chunk_that_was_on_its_way_is_drained(released: bool) -> None:
    memory = Memory(layout(), None)
    with FakePrefill() as prefill, Pair(config=ONE_CONNECTION, receive_memory=memory) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        (data,) = prefill.welcome()
        wait_until(lambda: session.up, "session up")
        one = pair.receiver.expect(session, 1, some_slots(1, (1, 0, 0)), 0)
        two = pair.receiver.expect(session, 2, some_slots(2, (1, 0, 0)), 0)
        late = chunk(one.transfer.transfer_id, PAGES, 1, 0, b"a" * 4096)
        data.sendall(late[:1000])
        page = memory.arrays[PAGES][1][some_slots(1, (1, 0, 0))[PAGES][0]]
        wait_until(lambda: page[0] == ord("a"), "the beginning of the chunk")
        if released:
            pair.receiver.release(one)
        else:
            pair.receiver.abort(one, "client gone")
        before = memory.copy()
        data.sendall(late[1000:])
        data.sendall(chunk(two.transfer.transfer_id, PAGES, 0, 0, b"c" * 1000))
        wait_until(lambda: two.transfer.bytes == 1000, "the chunk after it")
        before[PAGES][0][some_slots(2, (1, 0, 0))[PAGES]] = ord("c")
        for ours, theirs in zip(flat(memory.arrays), flat(before), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_prefill_aborts_in_the_middle_and_reuses_its_pages_at_once() -> None:
    with Pair() as pair:
        original = pair.source.copy()
        for room in range(20):
            for buffers, was in zip(pair.source.arrays, original, strict=True):
                for buffer, value in zip(buffers, was, strict=True):
                    buffer[:] = value
            slots = some_slots(room)
            transfer, item = pair.ready(room, slots)
            for array in flat(pair.target.arrays):
                array[:] = 0
            pair.sender.send(transfer, PAGES, 0, slots[PAGES][:19])
            pair.sender.send(transfer, 1, 0, slots[1])
            wait_until(lambda item=item, room=room: item.transfer.bytes > room * 5000, "some bytes")
            pair.sender.abort(transfer, "prefill ran out of memory")
            for array in flat(pair.source.arrays):
                array[:] = 0xEE
            wait_ended(item.transfer)
            assert item.transfer.state is State.FAILED
            assert item.transfer.reason == "prefill gave the request up: prefill ran out of memory"
            with item.transfer.lock:
                got = pair.target.copy()
            for component in (0, 1):
                for buffer, was in zip(got[component], original[component], strict=True):
                    rows, expected = buffer[slots[component]], was[slots[component]]
                    assert ((rows == expected) | (rows == 0)).all(), "a stale byte was written"
            pair.sender.release(transfer)
            pair.receiver.release(item)


def test_abort_before_prefills_own_request() -> None:
    with Pair() as pair:
        item = pair.receiver.expect(pair.session(), 7, some_slots(1), 0)
        wait_until(lambda: pair.sender._table.transfers(), "decode asked")
        pair.receiver.abort(item, "client gone")
        wait_until(lambda: not pair.sender._table.transfers(), "decode ended the room")
        assert pair.sender.transfer(7).reason == "decode ended the request: client gone"


def test_abort_without_an_expectation() -> None:
    with Pair() as pair:
        transfer = pair.sender.transfer(7)
        pair.receiver.abort_room(pair.dial(), 7, "no room for it")
        wait_ended(transfer)
        assert transfer.reason == "decode ended the request: no room for it"


def test_releasing_in_the_middle_tells_the_other_side() -> None:
    with Pair() as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES])
        pair.sender.release(transfer)
        wait_ended(item.transfer)
        assert item.transfer.reason == "prefill gave the request up: the request ended on the prefill side"
        pair.sender.release(transfer)
        works(pair, 7)


@pytest.mark.parametrize("how", ["pages", "unstarted", "too few", "twice"])
def test_whatever_ends_a_request_on_the_prefill_side_is_told(how: str) -> None:
    with Pair() as pair:
        slots = some_slots(1)
        item = pair.receiver.expect(pair.session(), 7, slots, 0)
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        if how == "pages":
            with transfer.lock:
                transfer.start(19)
            pair.sender.release(transfer)
            reason = "prefill would send 19 pages, decode reserved 20"
        elif how == "unstarted":
            pair.sender.send(transfer, PAGES, 0, slots[PAGES])
            reason = "items of component 0 were sent before decode asked for them"
        else:
            with transfer.lock:
                transfer.start(20)
            pair.sender.send(transfer, PAGES, 0, slots[PAGES])
            if how == "twice":
                pair.sender.send(transfer, PAGES, 0, slots[PAGES])
                reason = "items 0 to 20 of component 0 were sent twice"
            else:
                pair.sender.finish(transfer)
                reason = "prefill sent 0 items of component 1, decode reserved 2"
        wait_ended(transfer, item.transfer)
        assert transfer.reason == reason
        assert item.transfer.reason == f"prefill gave the request up: {reason}"
