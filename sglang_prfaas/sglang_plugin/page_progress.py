"""Which pages of a request are on their way, buffer by buffer, and where they are read. Needs no SGLang."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sglang_prfaas.transport.memory import Indices


class PageProgress:
    """A request's full-attention pages on the prefill side, item 0 the first that decode expects.

    SGLang hands pages over chunk by chunk, for all layers at once; layer-wise sending runs ahead of that, one layer
    after the other. Every buffer's items are queued in order and once, whoever comes first.
    """

    def __init__(self, buffers: int) -> None:
        self.handed_over = 0
        """Items that SGLang has handed over for all layers."""
        self._next_item = [0] * buffers
        self._ahead: list[tuple[int, Indices]] = []

    def due(self, stop: int, buffers: Sequence[int] | None = None) -> list[tuple[int, list[int]]]:
        """What is still to be queued of the items before `stop` in the buffers given (None: all), as pairs of first
        item and the buffers that begin with it. Counts as queued from now on."""
        groups: dict[int, list[int]] = {}
        for buffer in range(len(self._next_item)) if buffers is None else buffers:
            first = self._next_item[buffer]
            if first < stop:
                groups.setdefault(first, []).append(buffer)
                self._next_item[buffer] = stop
        return sorted(groups.items())

    def ran_ahead(self, first_item: int, slots: Indices) -> None:
        """Items were queued before SGLang handed them over; the mover reads them at `slots`, as they stand then."""
        self._ahead.append((first_item, slots))

    def hand_over(self, pages: Indices) -> bool:
        """SGLang hands the next items over, at `pages`. Where they lie elsewhere by now (the prefix cache had the same
        tokens already, and freed the request's own copy), what was queued ahead is read there. Call it under the
        transfer's lock, before anything can be written to the freed pages. Returns whether something has moved."""
        start, stop = self.handed_over, self.handed_over + len(pages)
        moved = False
        for first, slots in self._ahead:
            low, high = max(first, start), min(first + len(slots), stop)
            if low < high:
                there = slots[low - first : high - first]
                new = pages[low - start : high - start]
                moved = moved or not np.array_equal(there, new)
                there[:] = new
        self._ahead = [(first, slots) for first, slots in self._ahead if first + len(slots) > stop]
        self.handed_over = stop
        return moved
