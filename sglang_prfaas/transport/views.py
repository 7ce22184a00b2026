"""Bytes that lie in several places, as lists of views, end to end."""

from __future__ import annotations


def cut(views: list[memoryview], nbytes: int) -> list[tuple[list[memoryview], int]]:
    """Pieces of `nbytes` each at most, in order, with their lengths; a view is cut only where it is longer than a
    piece."""
    pieces: list[tuple[list[memoryview], int]] = []
    piece: list[memoryview] = []
    length = 0
    for view in views:
        size = len(view)
        if length + size > nbytes:
            if length:
                pieces.append((piece, length))
            while size > nbytes:
                pieces.append(([view[:nbytes]], nbytes))
                view = view[nbytes:]
                size -= nbytes
            piece, length = [], 0
        piece.append(view)
        length += size
    if length:
        pieces.append((piece, length))
    return pieces


def split(views: list[memoryview], count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first `count` bytes, and the rest."""
    for at, view in enumerate(views):
        if count < len(view):
            head = [view[:count]] if count else []
            return views[:at] + head, [view[count:], *views[at + 1 :]]
        count -= len(view)
    return views, []
