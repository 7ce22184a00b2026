"""Bytes that lie in several places, as lists of views, end to end."""

from __future__ import annotations


def cut(views: list[memoryview], nbytes: int) -> list[list[memoryview]]:
    """Pieces of `nbytes` each at most, in order; a view is cut only where it is longer than a piece."""
    pieces: list[list[memoryview]] = []
    room = 0
    for view in views:
        if pieces and len(view) <= room:
            pieces[-1].append(view)
            room -= len(view)
            continue
        for at in range(0, len(view), nbytes):
            part = view[at : at + nbytes]
            pieces.append([part])
            room = nbytes - len(part)
    return pieces


def split(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `count` bytes, and the rest."""
    for at, view in enumerate(views):
        if count < len(view):
            head = [view[:count]] if count else []
            return views[:at] + head, [view[count:], *views[at + 1 :]]
        count -= len(view)
    return views, []
