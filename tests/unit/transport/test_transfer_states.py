"""Transfers as state machines."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport import incoming_transfer
from sglang_prfaas.transport.admission import Admission
from sglang_prfaas.transport.framing import ChunkHeader
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.layout import Component, Layout
from sglang_prfaas.transport.messages import Expect
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.streams import cut
from sglang_prfaas.transport.transfer import FINAL, TRANSITIONS, State, Transfer

LAYOUT = Layout("m", "f", 1, 1, "", (0,), (Component("kv", (4, 3)), Component("state", (10,)), Component("none", ())))
COUNTS = (5, 1, 0)
TOTAL = 5 * 7 + 10


def outgoing(counts: tuple[int, ...] = COUNTS) -> tuple[OutgoingTransfer, VirtualClock]:
    clock = VirtualClock(100.0)
    transfer = OutgoingTransfer(9, clock)
    assert transfer.expect(Expect(1, 9, counts, 0))
    return transfer, clock


def incoming(counts: tuple[int, ...] = COUNTS) -> tuple[IncomingTransfer, VirtualClock]:
    clock = VirtualClock(100.0)
    return IncomingTransfer(9, 1, LAYOUT, counts, clock), clock


def chunk(component: int, buffer: int, offset: int, length: int) -> ChunkHeader:
    return ChunkHeader(1, component, buffer, offset, length)


def arrive(transfer: IncomingTransfer, header: ChunkHeader) -> bool:
    """A chunk comes and is good. Returns whether it was the last one missing."""
    claim = transfer.claim(header)
    return claim is not None and transfer.received(claim)


# --- outgoing ---------------------------------------------------------------------------------------------------------


def test_the_way_of_a_request_on_the_prefill_side() -> None:
    clock = VirtualClock(100.0)
    transfer = OutgoingTransfer(9, clock)
    clock.advance(1.0)
    assert transfer.expect(Expect(1, 9, COUNTS, 0))
    assert (transfer.state, transfer.ready_s) == (State.READY, 101.0)
    clock.advance(1.0)
    transfer.start(5)
    assert (transfer.state, transfer.started_s) == (State.SENDING, 102.0)
    assert transfer.queue(0, 0, 3, 2)
    assert transfer.queue(0, 3, 2, 2)
    assert transfer.queue(1, 0, 1, 1)
    clock.advance(1.0)
    transfer.finish()
    assert [transfer.all_sent] == [False]
    for length in (12, 9, 8, 6, 10):
        clock.advance(0.5)
        transfer.sent(length)
    assert transfer.all_sent
    assert (transfer.bytes, transfer.first_byte_s, transfer.last_byte_s) == (TOTAL, 103.5, 105.5)
    transfer.done()
    assert transfer.state is State.DONE
    assert not transfer.live


def test_decode_may_be_done_before_prefill_says_that_it_has_finished() -> None:
    transfer, _ = outgoing((1, 0, 0))
    transfer.start(1)
    transfer.queue(0, 0, 1, 2)
    transfer.done()
    transfer.finish()
    assert transfer.state is State.DONE


def test_a_request_of_nothing() -> None:
    transfer, _ = outgoing((0, 0, 0))
    transfer.done()
    assert transfer.state is State.DONE


def test_a_second_decode_rank_does_not_end_the_request_of_the_first() -> None:
    transfer, _ = outgoing()
    assert not transfer.expect(Expect(2, 9, (1, 1, 1), 0))
    assert transfer.state is State.READY
    assert transfer.expected is not None
    assert transfer.expected.transfer_id == 1


def test_a_wrong_page_count_holds_both_values() -> None:
    transfer, _ = outgoing()
    transfer.start(6)
    assert transfer.state is State.FAILED
    assert transfer.reason == "prefill would send 6 pages, decode reserved 5"


def test_items_sent_before_decode_asked() -> None:
    transfer, _ = outgoing()
    assert not transfer.queue(0, 0, 1, 1)
    assert transfer.reason == "items of component 0 were sent before decode asked for them"


@pytest.mark.parametrize(("component", "first", "items"), [(0, 4, 2), (0, 0, 6), (2, 0, 1), (3, 0, 1)])
def test_more_items_than_decode_reserved(component: int, first: int, items: int) -> None:
    transfer, _ = outgoing()
    transfer.start(5)
    assert not transfer.queue(component, first, items, 1)
    assert transfer.reason == f"prefill has more items of component {component} than decode reserved"


def test_items_sent_twice() -> None:
    transfer, _ = outgoing()
    transfer.start(5)
    assert transfer.queue(0, 0, 3, 1)
    assert not transfer.queue(0, 2, 2, 1)
    assert transfer.reason == "items 2 to 4 of component 0 were sent twice"


def test_items_of_some_buffers_only() -> None:
    transfer, _ = outgoing()
    transfer.start(5)
    assert transfer.queue(0, 0, 5, 1, [2], 3)
    assert transfer.queue(0, 0, 3, 1, [0, 1], 3)
    transfer.queue(1, 0, 1, 1)
    transfer.done()
    assert transfer.reason.endswith("prefill sent 3 items of component 0, decode reserved 5")
    again, _ = outgoing()
    again.start(5)
    assert again.queue(0, 0, 5, 1, [0, 1], 3)
    assert not again.queue(0, 4, 1, 1, [1, 2], 3)
    assert again.reason == "items 4 to 5 of component 0 were sent twice"


def test_fewer_items_than_decode_reserved() -> None:
    transfer, _ = outgoing()
    transfer.start(5)
    transfer.queue(0, 0, 5, 1)
    transfer.finish()
    assert transfer.reason == "prefill sent 0 items of component 1, decode reserved 1"


def test_decode_cannot_be_done_before_everything_was_sent() -> None:
    transfer, _ = outgoing()
    transfer.start(5)
    transfer.queue(0, 0, 4, 1)
    transfer.done()
    assert transfer.state is State.FAILED
    assert (
        transfer.reason == "decode reported the end too early: prefill sent 4 items of component 0, decode reserved 5"
    )
    unasked = OutgoingTransfer(1, VirtualClock())
    unasked.done()
    assert unasked.state is State.FAILED


def test_outgoing_timeouts() -> None:
    clock = VirtualClock()
    transfer = OutgoingTransfer(9, clock)
    clock.advance(10.0)
    assert transfer.poll_timeout(10.0, 1.0) == ""
    clock.advance(0.5)
    assert transfer.poll_timeout(10.0, 1.0) == "decode did not ask for the request within 10 s"
    transfer.expect(Expect(1, 9, (1, 0, 0), 0))
    clock.advance(1000.0)
    assert transfer.poll_timeout(10.0, 1.0) == "", "prefill may queue and compute as long as it needs"
    transfer.start(1)
    transfer.queue(0, 0, 1, 1)
    clock.advance(1000.0)
    assert transfer.poll_timeout(10.0, 1.0) == ""
    transfer.finish()
    clock.advance(1.0)
    transfer.sent(7)
    clock.advance(1.0)
    assert transfer.poll_timeout(10.0, 1.0) == ""
    clock.advance(0.5)
    assert transfer.poll_timeout(10.0, 1.0) == "no progress for 1 s, 7 bytes were sent"
    transfer.done()
    assert transfer.poll_timeout(10.0, 1.0) == ""


# --- incoming ---------------------------------------------------------------------------------------------------------


def test_the_way_of_a_request_on_the_decode_side() -> None:
    transfer, clock = incoming()
    assert (transfer.state, transfer.expected_bytes) == (State.EXPECTING, TOTAL)
    spans = [s for c, component in enumerate(LAYOUT.components) for s in cut(c, component.item_bytes, 0, COUNTS[c], 8)]
    for last, span in enumerate(spans, 1 - len(spans)):
        clock.advance(1.0)
        header = chunk(span.component, span.buffer, span.offset, span.length)
        assert arrive(transfer, header) is (last == 0)
        assert transfer.state is (State.DONE if last == 0 else State.RECEIVING)
    assert (transfer.bytes, transfer.duplicate_bytes) == (TOTAL, 0)
    assert (transfer.first_byte_s, transfer.last_byte_s) == (101.0, 100.0 + len(spans))


def test_nothing_expected_is_done_at_once() -> None:
    transfer, _ = incoming((0, 0, 0))
    assert transfer.state is State.DONE


def test_duplicates_count_once_and_are_no_progress() -> None:
    transfer, clock = incoming()
    arrive(transfer, chunk(1, 0, 0, 6))
    clock.advance(50.0)
    arrive(transfer, chunk(1, 0, 0, 6))
    assert (transfer.bytes, transfer.duplicate_bytes, transfer.progress_s) == (6, 6, 100.0)
    with pytest.raises(ProtocolError, match="sent before in another size"):
        transfer.claim(chunk(1, 0, 4, 6))
    arrive(transfer, chunk(1, 0, 6, 4))
    assert (transfer.bytes, transfer.duplicate_bytes, transfer.progress_s) == (10, 6, 150.0)


def test_a_newer_claim_takes_over_and_the_older_one_may_not_write() -> None:
    transfer, _ = incoming()
    old = transfer.claim(chunk(1, 0, 0, 6))
    assert old is not None
    assert old.pin()
    old.unpin()
    new = transfer.claim(chunk(1, 0, 0, 6))
    assert new is not None
    assert (old.revoked, old.pin()) == (True, False)
    assert transfer.received(new) is False
    transfer.give_up(old)
    assert transfer.bytes == 6


def test_a_claim_given_up_leaves_its_bytes_to_others() -> None:
    transfer, _ = incoming()
    claim = transfer.claim(chunk(1, 0, 0, 6))
    assert claim is not None
    transfer.give_up(claim)
    assert transfer.bytes == 0
    arrive(transfer, chunk(1, 0, 0, 6))
    assert transfer.bytes == 6


@pytest.mark.parametrize("how", ["fail", "done"])
def test_a_transfer_ends_only_when_no_copy_runs(how: str) -> None:
    transfer, _ = outgoing((0, 0, 0))
    assert transfer.pin()
    ended: list[State] = []

    def end() -> None:
        with transfer.lock:
            if how == "fail":
                transfer.fail("over")
            else:
                transfer.done()
        ended.append(transfer.state)

    thread = threading.Thread(target=end)
    thread.start()
    while transfer.pin():  # until the end has begun
        transfer.unpin()
    assert transfer.live
    assert not ended
    transfer.unpin()
    thread.join(60.0)
    assert ended == [State.FAILED if how == "fail" else State.DONE]
    assert not transfer.pin()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (chunk(3, 0, 0, 1), "component 3, buffer 0, which do not exist"),
        (chunk(0, 2, 0, 1), "component 0, buffer 2, which do not exist"),
        (chunk(2, 0, 0, 1), "component 2, buffer 0, which do not exist"),
        (chunk(0, 0, 20, 1), "ends at byte 21 of a stream of 20 bytes"),
        (chunk(0, 1, 14, 2), "ends at byte 16 of a stream of 15 bytes"),
        (chunk(0, 0, (1 << 64) - 1, 4), "of a stream of 20 bytes"),
    ],
)
def test_chunks_outside_of_what_is_expected(header: ChunkHeader, message: str) -> None:
    transfer, _ = incoming()
    with pytest.raises(ProtocolError, match=message):
        transfer.check(header)


def test_a_peer_cannot_make_us_remember_any_number_of_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming_transfer, "MAX_FRAGMENTS", 3)
    transfer, _ = incoming()
    for offset in (0, 4, 8):
        arrive(transfer, chunk(0, 0, offset, 1))
    with pytest.raises(ProtocolError, match="more than 3 separate ranges of component 0, buffer 0"):
        transfer.check(chunk(0, 0, 12, 1))


def test_incoming_timeouts() -> None:
    transfer, clock = incoming()
    clock.advance(10.0)
    assert transfer.poll_timeout(10.0, 1.0) == ""
    arrive(transfer, chunk(1, 0, 0, 6))
    clock.advance(10.5)
    assert transfer.poll_timeout(10.0, 1.0) == f"no byte for 10 s, 6 of {TOTAL} arrived"
    assert transfer.poll_timeout(10.0, 20.0) == ""
    transfer.fail("x")
    assert transfer.poll_timeout(10.0, 1.0) == ""


# --- both -------------------------------------------------------------------------------------------------------------


def test_final_states_have_no_way_out_and_every_state_can_fail() -> None:
    assert set(TRANSITIONS) == set(State)
    for state, following in TRANSITIONS.items():
        assert (State.FAILED in following) == (state not in FINAL)
        assert bool(following) == (state not in FINAL)


def test_the_document_lists_the_same_changes_of_state() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs" / "protocol.md").read_text()
    rows = re.findall(r"^\| `([A-Z]+)`[^|]*\| ([^|]+) \|$", text, re.MULTILINE)
    documented = {
        State[name]: frozenset(State[n] for n in re.findall(r"[A-Z]+", following)) for name, following in rows
    }
    assert documented == {state: following for state, following in TRANSITIONS.items() if following}


def test_the_first_reason_is_kept() -> None:
    transfer, _ = incoming()
    assert transfer.fail("first")
    assert not transfer.fail("second")
    assert transfer.reason == "first"


class Watch:
    """Checks what must hold after every event."""

    def __init__(self, transfer: Transfer) -> None:
        self.transfer = transfer
        self.last = (transfer.state, transfer.reason, transfer.bytes)

    def look(self) -> None:
        state, reason, count = self.last
        now = self.transfer.state
        assert now is state or now in TRANSITIONS[state]
        if state in FINAL:
            assert (now, self.transfer.reason) == (state, reason)
        assert self.transfer.bytes >= count
        assert self.transfer.live == (now not in FINAL)
        assert bool(self.transfer.reason) == (now is State.FAILED)
        self.last = (now, self.transfer.reason, self.transfer.bytes)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("expect"), st.integers(0, 3)),
            st.tuples(st.just("start"), st.integers(0, 3)),
            st.tuples(st.just("queue"), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
            st.tuples(st.just("sent"), st.integers(1, 9)),
            st.tuples(st.just("finish")),
            st.tuples(st.just("done")),
            st.tuples(st.just("fail")),
        ),
        max_size=30,
    )
)
def test_random_events_on_the_prefill_side(events: list[tuple[object, ...]]) -> None:
    transfer = OutgoingTransfer(9, VirtualClock())
    watch = Watch(transfer)
    queued = [0, 0]
    for name, *values in events:
        numbers = [v for v in values if isinstance(v, int)]
        match name:
            case "expect":
                transfer.expect(Expect(numbers[0], 9, (numbers[0], 1), 0))
            case "start":
                transfer.start(numbers[0])
            case "queue":
                if transfer.queue(numbers[0], numbers[1], numbers[2], 1):
                    queued[numbers[0]] += numbers[2]
            case "sent":
                transfer.sent(numbers[0])
            case "finish":
                transfer.finish()
            case "done":
                transfer.done()
            case _:
                transfer.fail("reason")
        watch.look()
        if transfer.expected is not None:
            assert all(n <= count for n, count in zip(queued, transfer.expected.counts, strict=True))
            if transfer.state is State.DONE:
                assert tuple(queued) == transfer.expected.counts


@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 22), st.integers(1, 22)),
            st.just("fail"),
        ),
        max_size=40,
    )
)
def test_random_chunks_on_the_decode_side(events: list[tuple[int, int, int, int] | str]) -> None:
    """Whatever arrives in whatever order: DONE exactly when every byte was there, each counted once."""
    transfer, _ = incoming()
    watch = Watch(transfer)
    arrived: set[tuple[int, int, int]] = set()
    failed = False
    for event in events:
        if isinstance(event, str):
            failed = transfer.fail("reason") or failed
        elif transfer.live:
            component, buffer, offset, length = event
            header = chunk(component, buffer, offset, length)
            before = len(arrived)
            try:
                complete = arrive(transfer, header)
            except ProtocolError:
                continue
            arrived |= {(component, buffer, at) for at in range(offset, offset + length)}
            assert complete is (len(arrived) == TOTAL and len(arrived) > before)
            assert transfer.bytes == len(arrived)
        else:
            count = transfer.bytes
            assert not transfer.pin(), "a late chunk is not written"
            assert transfer.bytes == count
        watch.look()
        assert (transfer.state is State.DONE) == (len(arrived) == TOTAL and not failed)


# --- room on the link -------------------------------------------------------------------------------------------------


def test_a_request_waits_for_room_on_its_link_and_gives_up() -> None:
    link: Admission[OutgoingTransfer] = Admission(TOTAL + 1, timeout_s=7)
    first, _ = outgoing()
    second, clock = outgoing()
    for transfer in (first, second):
        transfer.goes_over(link, TOTAL)
        assert transfer.admitted
    first.start(5)
    assert (first.admitted, second.admitted) == (True, False)
    assert second.poll_timeout(100.0, 1.0) == ""
    clock.advance(8.0)
    assert second.poll_timeout(100.0, 1.0) == link.refusal()
    first.acknowledged(TOTAL)
    assert second.poll_timeout(100.0, 1.0) == "", "there is room now"
    second.start(5)
    assert link.inflight_bytes == TOTAL
    second.fail("aborted")
    first.fail("aborted")
    assert (link.inflight_bytes, link.waiting) == (0, 0)
    assert second.admitted, "nothing waits for a request that has ended"
    assert link.waiting == 0


def test_a_request_that_ends_while_it_waits_leaves_the_queue() -> None:
    link: Admission[OutgoingTransfer] = Admission(1)
    transfer, _ = outgoing()
    transfer.goes_over(link, TOTAL)
    link.start("other", 1)  # type: ignore[arg-type]
    assert not transfer.admitted
    assert link.waiting == 1
    transfer.fail("aborted")
    assert link.waiting == 0
