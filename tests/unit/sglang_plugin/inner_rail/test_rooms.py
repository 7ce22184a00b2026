"""Names of requests on a rail: both ends give the i-th request of a room the same one, and no two share one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.sglang_plugin.inner_rail.rooms import RailRooms

rooms = st.integers(0, (1 << 63) - 1)


def test_one_request_has_the_name_of_its_room() -> None:
    held = RailRooms()
    assert held.take(7) == 7
    assert held.take(8) == 8
    held.give_back(7)
    assert held.take(7) == 7


@given(rooms, st.integers(1, 256))
def test_requests_of_one_room_have_names_of_their_own(room: int, count: int) -> None:
    here, there = RailRooms(), RailRooms()
    names = [here.take(room) for _ in range(count)]
    assert names == [there.take(room) for _ in range(count)]
    assert len(set(names)) == count
    assert all(0 <= name < 1 << 63 for name in names)


def test_names_are_not_given_twice_while_some_are_held() -> None:
    held = RailRooms()
    names = [held.take(5), held.take(5)]
    held.give_back(5)
    assert held.take(5) not in names


@given(st.lists(rooms, max_size=20))
def test_nothing_is_kept_of_ended_requests(taken: list[int]) -> None:
    held = RailRooms()
    for room in taken:
        held.take(room)
    for room in taken:
        held.give_back(room)
    assert not held._rooms
