"""Byte ranges of streams: cutting items into chunks, placing chunks back onto items, and knowing what has arrived."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from msgspec import Struct


class Piece(Struct, frozen=True):
    """Bytes `start` to `stop` (exclusive) of item `item` of a request."""

    item: int
    start: int
    stop: int


class ChunkSpan(Struct, frozen=True):
    """One chunk to be sent: bytes `offset` to `offset + length` of stream (component, buffer)."""

    component: int
    buffer: int
    offset: int
    length: int


def cut(
    component: int,
    item_bytes: tuple[int, ...],
    first_item: int,
    items: int,
    chunk_bytes: int,
    buffers: Sequence[int] | None = None,
) -> Iterator[ChunkSpan]:
    """Cut items `first_item` to `first_item + items` of the buffers given (None: of every one) into chunks of at most
    `chunk_bytes`.

    A chunk holds whole items where at least one fits, else a part of a single item, so that a receiver never has to
    place bytes across an item's end. Chunks of one item range come buffer by buffer.
    """
    for buffer in range(len(item_bytes)) if buffers is None else buffers:
        size = item_bytes[buffer]
        if size == 0 or items == 0:
            continue
        per_chunk = chunk_bytes // size
        if per_chunk:
            for item in range(first_item, first_item + items, per_chunk):
                count = min(per_chunk, first_item + items - item)
                yield ChunkSpan(component, buffer, item * size, count * size)
            continue
        for item in range(first_item, first_item + items):
            for start in range(0, size, chunk_bytes):
                yield ChunkSpan(component, buffer, item * size + start, min(chunk_bytes, size - start))


def pieces(offset: int, length: int, item_bytes: int) -> Iterator[Piece]:
    """The parts of items that bytes `offset` to `offset + length` of a stream cover, in order."""
    end = offset + length
    while offset < end:
        item, start = divmod(offset, item_bytes)
        stop = min(item_bytes, start + end - offset)
        yield Piece(item, start, stop)
        offset += stop - start


class RangeSet:
    """Disjoint half-open byte ranges, merged as they touch. Tells new bytes from those that came before."""

    __slots__ = ("_starts", "_stops", "total")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.total = 0
        """Bytes held."""

    def add(self, start: int, stop: int) -> int:
        """Add a range; returns how many of its bytes were not there before."""
        if stop <= start:
            return 0
        first = bisect_left(self._stops, start)
        last = first
        covered = 0
        low, high = start, stop
        while last < len(self._starts) and self._starts[last] <= stop:
            covered += max(0, min(stop, self._stops[last]) - max(start, self._starts[last]))
            low = min(low, self._starts[last])
            high = max(high, self._stops[last])
            last += 1
        self._starts[first:last] = [low]
        self._stops[first:last] = [high]
        new = stop - start - covered
        self.total += new
        return new

    def covered(self, start: int, stop: int) -> int:
        """How many bytes of a range are held."""
        at = bisect_right(self._stops, start)
        total = 0
        while at < len(self._starts) and self._starts[at] < stop:
            total += min(stop, self._stops[at]) - max(start, self._starts[at])
            at += 1
        return total

    def __len__(self) -> int:
        """How many separate ranges there are."""
        return len(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._starts, self._stops, strict=True))

    def __repr__(self) -> str:
        return f"RangeSet({list(self)}, {self.total} bytes)"
