"""Bytes that lie in several places, as lists of views, end to end."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate


def cut(views: list[memoryview], nbytes: int) -> list[tuple[list[memoryview], int]]:
    """Pieces of `nbytes` each at most, in order, with their lengths; a view is cut only where it is longer than a
    piece."""
    pieces: list[tuple[list[memoryview], int]] = []
    ends = list(accumulate(map(len, views)))
    at = begin = 0
    while at < len(views):
        stop = bisect_right(ends, begin + nbytes, at)
        if stop == at:
            view = views[at]
            pieces.extend(([view[low : low + nbytes]], nbytes) for low in range(0, len(view) - nbytes, nbytes))
            tail = view[-(len(view) % nbytes or nbytes) :]
            pieces.append(([tail], len(tail)))
            stop = at + 1
        elif ends[stop - 1] > begin:
            pieces.append((views[at:stop], ends[stop - 1] - begin))
        at, begin = stop, ends[stop - 1]
    return pieces


def split(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `count` bytes, and the rest."""
    for at, view in enumerate(views):
        if count < len(view):
            head = [view[:count]] if count else []
            return views[:at] + head, [view[count:], *views[at + 1 :]]
        count -= len(view)
    return views, []
