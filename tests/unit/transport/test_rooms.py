"""Rooms of a prefill rank, and the chunks that wait for a decode rank."""

from __future__ import annotations

import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport import rooms
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.memory import RankMemory
from sglang_prfaas.transport.messages import Expect, Hello
from sglang_prfaas.transport.part_memory import SessionView
from sglang_prfaas.transport.rooms import Rooms
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.transfer import State

HELLO = Hello(1, "pd", "decode-0", Layout("m", "f", 1, 1, "", (), ()), 4, 1 << 20, b"i" * 16, 0)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(50.0)


@pytest.fixture
def held(clock: VirtualClock) -> Rooms:
    return Rooms(clock, 300.0)


def a_session(name: bytes = b"D1", share: int = 0) -> SendSession:
    view = SessionView(HELLO.layout, RankMemory([]), share, 2)
    return SendSession(name, HELLO, TransportConfig(), 0.0, view)


def test_prefill_first(held: Rooms) -> None:
    session = a_session()
    transfer = held.open(5)
    assert held.home(transfer) is None
    assert held.asked_for(5, session, 1) is transfer
    assert held.home(transfer) is session
    assert session.transfers == {1: transfer}
    assert held.forget(transfer) is session
    assert session.transfers == {}
    assert held.forget(transfer) is None


def test_decode_first(held: Rooms) -> None:
    session = a_session()
    transfer = held.asked_for(5, session, 1)
    assert held.open(5) is transfer
    assert held.home(transfer) is session


def test_requests_of_one_room_are_paired_as_they_come(held: Rooms) -> None:
    one, two = a_session(b"D1"), a_session(b"D2")
    first = held.open(5)
    second = held.open(5)
    assert held.asked_for(5, one, 1) is first
    assert held.asked_for(5, two, 1) is second
    third = held.asked_for(5, one, 2)
    assert held.open(5) is third
    assert [held.home(t) for t in (first, second, third)] == [one, two, one]
    held.forget(second)
    assert held.all() == [first, third]


def test_a_room_has_a_bound(held: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MAX_ROOM_TRANSFERS", 2)
    held.open(5)
    held.open(5)
    with pytest.raises(LocalError, match="room 5 is in use by 2 requests"):
        held.open(5)


def test_releasing_twice_does_not_touch_a_later_request_of_the_same_room(held: Rooms) -> None:
    first = held.open(5)
    held.asked_for(5, a_session(), 1)
    held.forget(first)
    session = a_session(b"D2")
    second = held.asked_for(5, session, 7)
    held.forget(first)
    assert held.open(5) is second
    assert held.home(second) is session


def test_two_decode_ranks_never_share_a_transfer(held: Rooms) -> None:
    one, two = a_session(b"D1"), a_session(b"D2")
    transfer = held.asked_for(5, one, 1)
    other = held.asked_for(5, two, 1)
    assert other is not transfer
    assert (held.home(transfer), held.home(other)) == (one, two)


def test_nobody_ends_the_request_of_another(held: Rooms) -> None:
    one, two = a_session(b"D1"), a_session(b"D2")
    transfer = held.open(5)
    held.asked_for(5, one, 1)
    assert held.aborted(5, two, 1, "x") is None
    assert held.aborted(5, None, 1, "x") is None
    assert held.aborted(5, two, 0, "x") is None
    assert held.aborted(6, one, 1, "x") is None
    assert held.aborted(5, one, 1, "x") is transfer


def test_a_request_that_nobody_asked_for_can_be_ended_without_a_session(held: Rooms) -> None:
    transfer = held.open(5)
    assert held.aborted(5, None, 0, "no session") is transfer


def test_an_end_that_comes_before_the_request(held: Rooms) -> None:
    assert held.aborted(5, None, 0, "client gone") is None
    transfer = held.open(5)
    assert (transfer.state, transfer.reason) == (State.FAILED, "client gone")
    assert held.open(5).live, "one end is one request's"


def test_an_early_room_that_is_ended(held: Rooms) -> None:
    session = a_session()
    early = held.asked_for(5, session, 1)
    assert held.aborted(5, session, 1, "client gone") is early
    assert session.transfers == {}
    assert held.open(5).reason == "client gone"


def test_an_early_room_whose_session_is_lost(held: Rooms) -> None:
    session = a_session()
    early = held.asked_for(5, session, 1)
    own = held.open(6)
    held.asked_for(6, session, 2)
    assert held.lost(session, "decode died") == [early, own]
    assert held.open(5).reason == "decode died"
    assert held.home(own) is session, "prefill has not released it yet"


def test_ends_remembered_have_a_bound_and_do_not_push_out_early_rooms(
    held: Rooms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "MAX_ABORTED", 3)
    early = held.asked_for(1, a_session(), 1)
    for room in range(10, 20):
        held.aborted(room, None, 0, f"end of {room}")
    assert held.open(1) is early
    assert held.open(19).reason == "end of 19"
    assert held.open(10).live


def test_ends_of_one_room_have_a_bound_too(held: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rooms, "MAX_ABORTED", 4)
    for number in range(10):
        held.aborted(number // 3, None, 0, f"end {number}")
    assert held._aborted_count == sum(len(reasons) for reasons, _ in held._aborted.values()) <= 4
    assert held.open(3).reason == "end 9"
    assert held._aborted_count == sum(len(reasons) for reasons, _ in held._aborted.values())


def test_expiry(held: Rooms, clock: VirtualClock) -> None:
    session = a_session()
    early = held.asked_for(1, session, 7)
    own = held.open(2)
    held.aborted(3, None, 0, "x")
    clock.advance(300.0)
    assert held.expire() == []
    clock.advance(1.0)
    assert held.expire() == [(early, session, 7)]
    assert session.transfers == {}
    assert held.all() == [own]
    assert held.open(3).live
    assert held.open(1).live


# --- chunks that wait -------------------------------------------------------------------------------------------------


def test_names_of_sessions() -> None:
    assert str(a_session()) == "decode pd/decode-0"
    assert Expect(1, 2, (), 0).room == 2


def test_each_share_of_a_request_is_paired_on_its_own(held: Rooms) -> None:
    left, right = a_session(b"L", 0), a_session(b"R", 1)
    early = held.asked_for(5, right, 1)
    first = held.open(5)
    assert first is not early
    assert held.asked_for(5, left, 1) is first
    assert held.open(5, 1) is early
    assert held.home(early) is right
    assert held.aborted(5, right, 0, "gone") is None
    assert held.open(5, 1).reason == "gone"
    assert held.open(5).live
