"""A part of every item of a buffer, seen as a buffer of its own: what moves between ranks of different widths, and
between servers of different page sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_prfaas.transport.device_memory import TorchBuffer, copying
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.memory import Buffer, Bytes, HostBuffer, Indices, RankMemory
from sglang_prfaas.transport.paging import cut, obstacle, repaged, unit_of, units_of_items
from sglang_prfaas.transport.reshape import ItemPart, between, can_be_divided, moves, share_of


class PartBuffer:
    """The bytes `part` of the items of `base`, end to end; slots are those of `base`. An empty part has items of no
    bytes, and nothing moves."""

    def __init__(self, base: HostBuffer | TorchBuffer, part: ItemPart) -> None:
        self.item_bytes = part.bytes
        self.slots = base.slots
        self.on_device = base.on_device
        self._part = part
        self._rows: Any = base.items.reshape(base.slots, part.rows, part.row_bytes)

    def gather(self, indices: Indices, first_item: int, offset: int, out: Bytes) -> None:
        low, high = offset // self.item_bytes, -(-(offset + len(out)) // self.item_bytes)
        start = offset - low * self.item_bytes
        out[:] = self._read(indices[low - first_item : high - first_item]).reshape(-1)[start : start + len(out)]

    def scatter(self, indices: Indices, first_item: int, offset: int, data: Bytes) -> None:
        low, high = offset // self.item_bytes, -(-(offset + len(data)) // self.item_bytes)
        start = offset - low * self.item_bytes
        slots = indices[low - first_item : high - first_item]
        if start or len(data) % self.item_bytes:
            # A part of an item: the rest stays as it is. The transfer's lock keeps other chunks of the item away.
            whole = self._read(slots).reshape(-1)
            whole[start : start + len(data)] = data
            data = whole
        self._write(slots, data)

    def views(self, indices: Indices, first_item: int, offset: int, length: int) -> list[memoryview]:
        """None: the bytes do not lie end to end."""
        return []

    def _read(self, slots: Indices) -> Bytes:
        """`[len(slots), item_bytes]`, a copy."""
        parts = [self._rows[:, :, low:high] for low, high in self._part.parts]
        if isinstance(self._rows, np.ndarray):
            rows: Bytes = np.concatenate([part[slots] for part in parts], axis=2)
            return rows.reshape(len(slots), -1)
        import torch

        with copying(self._rows.device):
            at = torch.from_numpy(slots).to(self._rows.device)
            found = torch.cat([part.index_select(0, at) for part in parts], dim=2)
            host: Bytes = found.reshape(len(slots), -1).cpu().numpy()
            return host

    def _write(self, slots: Indices, data: Bytes) -> None:
        values = data.reshape(len(slots), self._part.rows, -1)
        if isinstance(self._rows, np.ndarray):
            at = 0
            for low, high in self._part.parts:
                self._rows[slots, :, low:high] = values[:, :, at : at + high - low]
                at += high - low
            return
        import torch

        device = self._rows.device
        with copying(device) as staging:
            rows, source = torch.from_numpy(slots).to(device), torch.from_numpy(values).to(device)
            at = 0
            for low, high in self._part.parts:
                self._rows[:, :, low:high].index_copy_(0, rows, source[:, :, at : at + high - low])
                at += high - low
            if staging is not None:
                staging.stream.synchronize()


def part_memory(memory: RankMemory, parts: list[list[ItemPart]]) -> RankMemory:
    """`memory` reduced to `parts[c][b]` of the items of every buffer. A whole item stays the buffer that it was."""

    def reduced(buffer: Buffer, part: ItemPart) -> Buffer:
        if part.is_whole:
            return buffer
        assert isinstance(buffer, (HostBuffer, TorchBuffer)), buffer
        return PartBuffer(buffer, part)

    return RankMemory(
        [
            [reduced(buffer, part) for buffer, part in zip(buffers, of_component, strict=True)]
            for buffers, of_component in zip(memory.components, parts, strict=True)
        ]
    )


class SessionView(NamedTuple):
    """What of a rank's memory takes part in a session with a rank of another server, and its layout there."""

    layout: Layout
    memory: RankMemory
    share: int = 0
    shares: int = 1
    """On the prefill side: which of so many decode ranks it is that this rank serves for a request."""
    units: tuple[int, ...] = ()
    """Items of `layout` that an item of each component is here; empty where the page sizes are the same."""
    peer_page_tokens: int = 0
    """Page size at the other end; 0 where it is the same."""

    def checked(self, component: int, indices: npt.ArrayLike) -> Indices:
        """Slots in `memory` of items that this rank has at `indices`. Raises LocalError for those that do not exist."""
        if self.units and component < len(self.units):
            indices = cut(np.asarray(indices).reshape(-1), self.units[component])
        return self.memory.checked(component, indices)


class PrefillRank(NamedTuple):
    """A prefill rank, as a decode rank has to know it before they meet."""

    width: int
    """Attention TP width of its server."""
    rank: int
    page_tokens: int = 0
    """Page size of its server; 0: as here."""


def _in_units(layout: Layout, memory: RankMemory, page_tokens: int) -> SessionView:
    """A rank towards one with pages of `page_tokens` and the same width."""
    unit_tokens = unit_of(layout.page_tokens, page_tokens)
    units = units_of_items(layout, unit_tokens)
    if page_tokens == layout.page_tokens:
        return SessionView(layout, memory)

    def in_units(buffer: Buffer, parts: int) -> Buffer:
        if parts == 1:
            return buffer
        assert isinstance(buffer, (HostBuffer, TorchBuffer)), buffer
        return buffer.cut(parts)

    components = [
        [in_units(buffer, parts) for buffer in buffers] for buffers, parts in zip(memory.components, units, strict=True)
    ]
    return SessionView(repaged(layout, unit_tokens), RankMemory(components), units=units, peer_page_tokens=page_tokens)


def prefill_view(layout: Layout, memory: RankMemory, decode: Layout) -> SessionView:
    """A prefill rank towards a decode rank of layout `decode`. Call it without `reshape.problems` only."""
    view = _in_units(layout, memory, decode.page_tokens)
    if layout.tp_size == decode.tp_size:
        return view
    ranks = (layout.tp_size, layout.tp_rank), (decode.tp_size, decode.tp_rank)
    sources = [[moved.source for moved in buffers] for buffers in moves(view.layout, *ranks)]
    share, shares = share_of(layout.tp_size, decode.tp_size, decode.tp_rank)
    return view._replace(
        layout=between(view.layout, *ranks), memory=part_memory(view.memory, sources), share=share, shares=shares
    )


def decode_view(layout: Layout, memory: RankMemory, prefill: PrefillRank) -> SessionView:
    """A decode rank towards one of a prefill server's ranks. Where the two do not fit, the whole memory: prefill
    refuses the session then, and says why."""
    page_tokens = prefill.page_tokens or layout.page_tokens
    if obstacle(layout, unit_of(layout.page_tokens, page_tokens)):
        return SessionView(layout, memory)
    view = _in_units(layout, memory, page_tokens)
    if prefill.width == layout.tp_size or not can_be_divided(view.layout, prefill.width):
        return view
    ranks = (prefill.width, prefill.rank), (layout.tp_size, layout.tp_rank)
    targets = [[moved.target for moved in buffers] for buffers in moves(view.layout, *ranks)]
    return view._replace(layout=between(view.layout, *ranks), memory=part_memory(view.memory, targets))
