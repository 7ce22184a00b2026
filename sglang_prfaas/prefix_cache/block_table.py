"""A hash table of fixed size in two arrays: block hash to the number of a holder set.

Two choices of bucket per hash, eight places per bucket (d-left hashing: Broder and Mitzenmacher 2001). A place is freed
by writing zero: no tombstones, no rehashing, no pauses, and a lookup reads two cache lines per hash whatever happened
before. Entries whose two buckets are full go to a dict beside the arrays. Operations take arrays of hashes; those that
end in `_one` take one, without the fixed cost of array operations.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Places = NDArray[np.int64]
SetNumbers = NDArray[np.uint16]

_WAYS = 8
_BUCKET = struct.Struct(f"={_WAYS}Q")
_FILL = 0.75
"""Share of the places that is used at most: above it, more and more entries would have both buckets full."""

_MIX_INT = 0x9E3779B97F4A7C15  # odd; the second choice shall not follow the order of sorted hashes
_MIX = np.uint64(_MIX_INT)


class BlockTable:
    """Holds up to `max_blocks` hashes. Hashes need uniform bits (SHA-256's are); set number 0 means absent.

    Memory: 10 bytes a place, `max_blocks / 0.75` places, allocated at once.
    """

    def __init__(self, max_blocks: int) -> None:
        if max_blocks < 1:
            raise ValueError(f"max_blocks is {max_blocks}, expected at least 1")
        self.max_blocks = max_blocks
        self._half = max(1, -(-int(max_blocks / _FILL) // (2 * _WAYS)))  # buckets of each of the two choices
        self.places = 2 * self._half * _WAYS
        self._keys = np.zeros((2 * self._half, _WAYS), np.uint64)
        self._flat = self._keys.reshape(-1)
        self._numbers = np.zeros(self.places, np.uint16)
        self._key_view, self._number_view = self._flat.data, self._numbers.data
        self._beside: dict[int, int] = {}  # place (from `places` on) by hash, where both buckets were full
        self._beside_at: dict[int, tuple[int, int]] = {}  # hash and set number by place
        self._beside_next = self.places
        self._in_arrays = 0

    def __len__(self) -> int:
        return self._in_arrays + len(self._beside)

    @property
    def memory_bytes(self) -> int:
        """Bytes of the arrays, and an estimate for entries beside them."""
        return self._keys.nbytes + self._numbers.nbytes + 250 * len(self._beside)

    @property
    def beside(self) -> int:
        """Entries for which both buckets were full."""
        return len(self._beside)

    def find(self, hashes: Hashes) -> Places:
        """The place of each hash, -1 where it is absent."""
        hashes = _no_zero(hashes)
        first, second = self._buckets(hashes)
        buckets = np.concatenate((first, second))
        hit = self._keys[buckets] == np.concatenate((hashes, hashes))[:, None]
        places = np.full(len(hashes), -1, np.int64)
        rows, ways = np.divmod(np.flatnonzero(hit), _WAYS)
        places[rows % max(1, len(hashes))] = buckets[rows] * _WAYS + ways
        if self._beside:
            for index in np.flatnonzero(places < 0).tolist():
                places[index] = self._beside.get(int(hashes[index]), -1)
        return places

    def numbers(self, hashes: Hashes) -> SetNumbers:
        """The set number of each hash, 0 where it is absent."""
        return self.numbers_at(self.find(hashes))

    def numbers_at(self, places: Places) -> SetNumbers:
        """The set number at each place, 0 for place -1."""
        if self._beside and len(places) and places.max() >= self.places:
            return np.array([self._number_at(place) for place in places.tolist()], np.uint16)
        numbers = self._numbers[places]
        numbers[places < 0] = 0
        return numbers

    def write(self, places: Places, number: int) -> None:
        """Give all these places, which must be in use, one set number; 0 frees them."""
        inside = places
        if self._beside and len(places) and places.max() >= self.places:
            inside = places[places < self.places]
            for place in places[places >= self.places].tolist():
                self._write_beside(place, number)
        self._numbers[inside] = number
        if number == 0:
            self._flat[inside] = 0
            self._in_arrays -= len(inside)

    def insert(self, hashes: Hashes, number: int) -> int:
        """Add hashes that are absent and distinct, all with one set number; returns how many of them, from the front,
        there was room for."""
        hashes = _no_zero(hashes[: max(0, self.max_blocks - len(self))])
        at_once = max(64, self.places // 64)  # the emptier bucket is chosen well only among few at a time
        for start in range(0, len(hashes), at_once):
            self._insert(hashes[start : start + at_once], number)
        return len(hashes)

    def find_one(self, value: int) -> int:
        """The place of one hash; where it is absent, -1 - p with the place p at which `insert_one` can put it."""
        value = value or _MIX_INT
        keys, low = self._key_view, (value & 0xFFFFFFFF) * self._half >> 32
        first = _BUCKET.unpack_from(keys, low * _BUCKET.size)
        if value in first:
            return low * _WAYS + first.index(value)
        high = (((value * _MIX_INT & 0xFFFFFFFFFFFFFFFF) >> 32) * self._half >> 32) + self._half
        second = _BUCKET.unpack_from(keys, high * _BUCKET.size)
        if value in second:
            return high * _WAYS + second.index(value)
        if self._beside and value in self._beside:
            return self._beside[value]
        free, more = first.count(0), second.count(0)
        if not (free or more):
            return -1 - self._beside_next
        return -1 - (low * _WAYS + first.index(0) if free >= more else high * _WAYS + second.index(0))

    def number_at_one(self, place: int) -> int:
        """The set number at one place, 0 for a negative one."""
        return self._number_view[place] if 0 <= place < self.places else self._number_at(place)

    def write_one(self, place: int, number: int) -> None:
        """Give one place, which must be in use, another set number; 0 frees it."""
        if place >= self.places:
            self._write_beside(place, number)
            return
        self._number_view[place] = number
        if number == 0:
            self._key_view[place] = 0
            self._in_arrays -= 1

    def insert_one(self, place: int, value: int, number: int) -> int:
        """Put one hash at the place that `find_one` named; returns 1, or 0 where the table is full."""
        if len(self) >= self.max_blocks:
            return 0
        value = value or _MIX_INT
        if place >= self.places:
            self._put_beside(value, number)
            return 1
        self._key_view[place] = value
        self._number_view[place] = number
        self._in_arrays += 1
        return 1

    def used_in(self, start: int, stop: int) -> tuple[Places, SetNumbers]:
        """Places in use from `start` to `stop`, and their set numbers. From `places` on come the entries beside."""
        inside = np.flatnonzero(self._numbers[start:stop]) + start
        if stop < self.places or not self._beside:
            return inside, self._numbers[inside]
        beside = np.fromiter(self._beside_at, np.int64, len(self._beside_at))
        places = np.concatenate((inside, beside))
        return places, self.numbers_at(places)

    def hashes_at(self, places: Places) -> Hashes:
        """The hash at each place, which must be in use."""
        if self._beside and len(places) and places.max() >= self.places:
            return np.array([self._hash_at(place) for place in places.tolist()], np.uint64)
        return self._flat[places]

    def _hash_at(self, place: int) -> int:
        return int(self._flat[place]) if place < self.places else self._beside_at[place][0]

    def _insert(self, remaining: Hashes, number: int) -> None:
        while len(remaining):
            first, second = self._buckets(remaining)
            empty_first = self._keys[first] == 0
            empty_second = self._keys[second] == 0
            free_first, free_second = empty_first.sum(1), empty_second.sum(1)
            left = free_first >= free_second
            buckets = np.where(left, first, second)
            ways = np.where(left, empty_first.argmax(1), empty_second.argmax(1))
            room = np.maximum(free_first, free_second) > 0
            if not room.all():
                for value in remaining[~room].tolist():
                    self._put_beside(value, number)
                buckets, ways, remaining = buckets[room], ways[room], remaining[room]
            places = buckets * _WAYS + ways
            self._flat[places] = remaining  # where several want one place, the last one gets it
            won = self._flat[places] == remaining
            self._numbers[places[won]] = number
            self._in_arrays += int(won.sum())
            remaining = remaining[~won]

    def _buckets(self, hashes: Hashes) -> tuple[Places, Places]:
        half = np.uint64(self._half)
        low = (hashes & np.uint64(0xFFFFFFFF)) * half >> np.uint64(32)
        high = (hashes * _MIX >> np.uint64(32)) * half >> np.uint64(32)
        return low.astype(np.int64), high.astype(np.int64) + self._half

    def _put_beside(self, value: int, number: int) -> None:
        self._beside[value] = self._beside_next
        self._beside_at[self._beside_next] = (value, number)
        self._beside_next += 1

    def _number_at(self, place: int) -> int:
        if place < 0:
            return 0
        return int(self._numbers[place]) if place < self.places else self._beside_at[place][1]

    def _write_beside(self, place: int, number: int) -> None:
        value, _ = self._beside_at.pop(place)
        if number:
            self._beside_at[place] = (value, number)
        else:
            del self._beside[value]


def _no_zero(hashes: Hashes) -> Hashes:
    """Zero marks a free place: the one hash in 2**64 that is zero is taken for another one."""
    return np.where(hashes == 0, _MIX, hashes)
