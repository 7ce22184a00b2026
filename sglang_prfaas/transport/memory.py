"""A rank's cache memory as buffers of equal items: gather from it, scatter into it.

Addresses come from the local SGLang process only, never from a peer. Every slot index is checked against its buffer
when a request is set up, so that a copy can neither read nor write outside of it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from operator import sub
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sglang_prfaas.errors import LocalError
from sglang_prfaas.transport.streams import pieces

Indices = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

MAX_VIEWS = 256
"""Items of one chunk that `views` gives; the kernel takes 1024 places in one call."""
FEW = 16
"""So many slots are looked at sooner in Python than in numpy."""
MIN_VIEW_BYTES = 2048
"""Mean bytes of an item that is sent and received where it lies; smaller ones are copied together."""


class Buffer(Protocol):
    """`slots` items of `item_bytes` bytes each."""

    item_bytes: int
    slots: int
    on_device: bool
    """Whether the items lie in a device's memory, which copies to and from page-locked memory best."""

    def gather(self, indices: Indices, first_item: int, offset: int, out: Bytes) -> None:
        """Copy bytes `offset` to `offset + len(out)` of a request's stream to `out`; item i lies at slot
        `indices[i - first_item]`."""

    def scatter(self, indices: Indices, first_item: int, offset: int, data: Bytes) -> None:
        """The reverse of `gather`: place `data` at the items it covers."""

    def views(self, indices: Indices, first_item: int, offset: int, length: int) -> list[memoryview]:
        """The same bytes where they lie, end to end, to be sent from or received into without a copy; empty where that
        is not possible, or would cost more than a copy."""


class HostBuffer:
    """Items in this process's memory, given by address and length in bytes."""

    on_device = False

    def __init__(self, address: int, nbytes: int, item_bytes: int) -> None:
        self.item_bytes = item_bytes
        self.slots = nbytes // item_bytes if item_bytes else 0
        self._address = address
        raw = (ctypes.c_uint8 * (self.slots * item_bytes)).from_address(address)
        self._items: Bytes = np.ctypeslib.as_array(raw).reshape(self.slots, item_bytes)
        self.bytes = memoryview(raw).cast("B")
        """The memory itself, end to end."""

    def views(self, indices: Indices, first_item: int, offset: int, length: int) -> list[memoryview]:
        size = self.item_bytes
        item, start = divmod(offset, size)
        last = (offset + length - 1) // size
        count = last - item + 1
        if count > MAX_VIEWS or length < MIN_VIEW_BYTES * count:
            return []
        rows = indices[item - first_item : last - first_item + 1].tolist()
        memory = self.bytes
        if count == 1:
            low = rows[0] * size + start
            return [memory[low : low + length]]
        found = [memory[row * size : row * size + size] for row in rows]
        if start:
            found[0] = found[0][start:]
        if rest := (last + 1) * size - (offset + length):
            found[-1] = found[-1][:-rest]
        if 1 in map(sub, rows[1:], rows):
            return self._joined(rows, found)
        return found

    def _joined(self, rows: list[int], views: list[memoryview]) -> list[memoryview]:
        """The same with one view for items that lie next to each other."""
        size, memory = self.item_bytes, self.bytes
        found: list[memoryview] = []
        high = -1
        for row, view in zip(rows, views, strict=True):
            if row * size == high:
                low = high - len(found[-1])
                found[-1] = memory[low : high + len(view)]
                high += len(view)
            else:
                found.append(view)
                high = (row + 1) * size
        return found

    @property
    def items(self) -> Bytes:
        """The memory itself, `[slots, item_bytes]`."""
        return self._items

    def cut(self, parts: int) -> HostBuffer:
        """The same memory with `parts` times as many items."""
        return HostBuffer(self._address, self.slots * self.item_bytes, self.item_bytes // parts)

    def gather(self, indices: Indices, first_item: int, offset: int, out: Bytes) -> None:
        item, start = divmod(offset, self.item_bytes)
        count, rest = divmod(len(out), self.item_bytes)
        if start == 0 and rest == 0:
            rows = indices[item - first_item : item - first_item + count]
            # clip: take() would buffer `out` in its default mode; indices were checked when the request was set up.
            np.take(self._items, rows, axis=0, out=out.reshape(count, self.item_bytes), mode="clip")
            return
        at = 0
        for piece in pieces(offset, len(out), self.item_bytes):
            size = piece.stop - piece.start
            out[at : at + size] = self._items[indices[piece.item - first_item], piece.start : piece.stop]
            at += size

    def scatter(self, indices: Indices, first_item: int, offset: int, data: Bytes) -> None:
        item, start = divmod(offset, self.item_bytes)
        count, rest = divmod(len(data), self.item_bytes)
        if start == 0 and rest == 0:
            rows = indices[item - first_item : item - first_item + count]
            self._items[rows] = data.reshape(count, self.item_bytes)
            return
        at = 0
        for piece in pieces(offset, len(data), self.item_bytes):
            size = piece.stop - piece.start
            self._items[indices[piece.item - first_item], piece.start : piece.stop] = data[at : at + size]
            at += size


class RankMemory:
    """All buffers of a rank: `components[c][b]`."""

    def __init__(self, components: Sequence[Sequence[Buffer]]) -> None:
        self.components = [list(buffers) for buffers in components]
        self._slots = [
            min((buffer.slots for buffer in buffers if buffer.item_bytes), default=None) for buffers in self.components
        ]
        """Of each component; None where its items have no bytes."""
        self._on_device = any(buffer.on_device for buffers in self.components for buffer in buffers)

    def staging(self, nbytes: int) -> Bytes:
        """Memory to copy chunks through: page-locked where the buffers lie on a device."""
        if not self._on_device:
            return np.empty(nbytes, np.uint8)
        import torch

        pinned: Bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
        return pinned

    @property
    def nbytes(self) -> int:
        """Of all buffers together."""
        return sum(buffer.slots * buffer.item_bytes for buffers in self.components for buffer in buffers)

    def checked(self, component: int, indices: npt.ArrayLike) -> Indices:
        """Slot indices of a request's items, as an int64 vector of its own. Raises LocalError for one outside of the
        component's buffers."""
        if not 0 <= component < len(self.components):
            raise LocalError(f"component {component} does not exist, this rank has {len(self.components)}")
        given = np.asarray(indices).reshape(-1)
        if not given.size:
            return np.empty(0, dtype=np.int64)
        if given.dtype.kind not in "iu":
            raise LocalError(f"component {component}: slots must be integers, {given.dtype} given")
        slots = self._slots[component]
        if given.size <= FEW:
            values = given.tolist()
            low, high = min(values), max(values)
        else:
            low, high = int(given.min()), int(given.max())
        if low < 0 or (slots is not None and high >= slots):
            raise LocalError(f"component {component}: slots {low} to {high} asked for, 0 to {(slots or 0) - 1} exist")
        return np.array(given, dtype=np.int64)
