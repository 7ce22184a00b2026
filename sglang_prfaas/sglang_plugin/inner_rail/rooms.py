"""Names of requests on a rail, which knows only one request of a room at a time. Needs no SGLang."""

from __future__ import annotations

from msgspec import Struct

_STEP = 0x1E3779B97F4A7C15
_MASK = (1 << 63) - 1


class _Room(Struct):
    taken: int = 0
    live: int = 0


class RailRooms:
    """SGLang gives the samples of one prompt (`n` above 1) one room. Both ends number those they hold, in the order
    they come, and name the i-th alike: any of prefill's may go to any of decode's, as their prompts are the same."""

    def __init__(self) -> None:
        self._rooms: dict[int, _Room] = {}

    def take(self, room: int) -> int:
        """The name on the rail of one more request of `room`; that of the first is the room itself."""
        held = self._rooms.setdefault(room, _Room())
        name = room ^ (held.taken * _STEP & _MASK)
        held.taken += 1
        held.live += 1
        return name

    def give_back(self, room: int) -> None:
        """A request of `room` has ended; after the last one numbers begin anew."""
        held = self._rooms[room]
        held.live -= 1
        if not held.live:
            del self._rooms[room]
