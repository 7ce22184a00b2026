"""Buffers of a rank's cache memory on a CUDA device, or in any torch tensor."""

from __future__ import annotations

import contextlib
import importlib.util
import threading
from collections.abc import Iterator
from typing import Any

from sglang_prfaas.transport.memory import Bytes, Indices
from sglang_prfaas.transport.streams import pieces

WORD_BYTES = 4
"""Rows that the kernels copy are whole words."""


class _DeviceMemory:
    """A raw device allocation in the form of the CUDA array interface, version 3, so that torch can view it."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": None,
            "typestr": "|u1",
            "version": 3,
        }


class _DeviceStaging:
    """What a thread copies with on one CUDA device: a stream, so that it never waits behind the model's kernels, and
    page-locked memory, which the device copies to without the help of the driver's own."""

    def __init__(self, device: Any) -> None:
        import torch

        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pinned = torch.empty(0, dtype=torch.uint8)

    def pinned(self, nbytes: int) -> Any:
        """Page-locked memory of this length; the same one every time."""
        import torch

        if self._pinned.numel() < nbytes:
            self._pinned = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self._pinned[:nbytes]


_of_thread = threading.local()


@contextlib.contextmanager
def copying(device: Any) -> Iterator[_DeviceStaging | None]:
    """Run what is inside on the calling thread's copy stream of a CUDA device; None for another device."""
    if device.type != "cuda":
        yield None
        return
    import torch

    held = _of_thread.__dict__.setdefault("staging", {})
    if device not in held:
        held[device] = _DeviceStaging(device)
    with torch.cuda.device(device), torch.cuda.stream(held[device].stream):
        yield held[device]


class DeviceRows:
    """Rows of a tensor [slots, item_bytes] of uint8: those of many slots are taken in one launch of the `kv_pack`
    kernels on CUDA, where `prfaas_kernels` is installed and rows are whole words; by torch otherwise."""

    def __init__(self, items: Any, *, kernels: bool | None = None) -> None:
        """kernels: whether to use them; None: where they are of use. Raises ValueError where they cannot be used."""
        self._items = items
        self._table: Any = None
        if kernels is None:
            kernels = (
                items.is_cuda
                and items.shape[1] % WORD_BYTES == 0
                and items.numel() > 0
                and importlib.util.find_spec("prfaas_kernels") is not None
            )
        if kernels:
            from prfaas_kernels.kv_pack import PoolTable

            self._table = PoolTable.of([items])

    def take(self, slots: Any) -> Any:
        """Rows at `slots`, an int64 tensor on the device: [len(slots), item_bytes], a copy."""
        if self._table is None:
            return self._items.index_select(0, slots)
        import torch
        from prfaas_kernels.kv_pack import pack_rows

        out = torch.empty(1, len(slots), self._items.shape[1], dtype=torch.uint8, device=self._items.device)
        return pack_rows(self._table, slots, out)[0]

    def put(self, slots: Any, rows: Any) -> None:
        """The reverse of `take`; no slot may repeat."""
        if self._table is None:
            self._items.index_copy_(0, slots, rows)
            return
        from prfaas_kernels.kv_pack import unpack_rows

        unpack_rows(self._table, slots, rows[None])


class TorchBuffer:
    """Items seen through a torch tensor [slots, item_bytes] of uint8, on any device; copies are complete on return."""

    def __init__(self, items: Any) -> None:
        self._items = items
        self._rows = DeviceRows(items)
        self.slots, self.item_bytes = (int(n) for n in items.shape)
        self.on_device = bool(items.is_cuda)

    @property
    def items(self) -> Any:
        """The tensor itself."""
        return self._items

    def cut(self, parts: int) -> TorchBuffer:
        """The same memory with `parts` times as many items."""
        return TorchBuffer(self._items.view(self.slots * parts, self.item_bytes // parts))

    @classmethod
    def on_cuda(cls, address: int, nbytes: int, item_bytes: int, device: int) -> TorchBuffer:
        """View `nbytes` of memory at `address` on CUDA device `device`."""
        import torch

        shape = (nbytes // item_bytes, item_bytes)
        return cls(torch.as_tensor(_DeviceMemory(address, shape), device=torch.device("cuda", device)))

    def views(self, indices: Indices, first_item: int, offset: int, length: int) -> list[memoryview]:
        return []

    def rows(self, indices: Indices, first_item: int, offset: int, length: int) -> Any:
        """Whole items as a tensor `[items, item_bytes]` on the device, a copy."""
        low, high = offset // self.item_bytes, (offset + length) // self.item_bytes
        return self._rows.take(self._placed(indices[low - first_item : high - first_item]))

    def gather(self, indices: Indices, first_item: int, offset: int, out: Bytes) -> None:
        import torch

        low, high = offset // self.item_bytes, -(-(offset + len(out)) // self.item_bytes)
        start = offset - low * self.item_bytes
        host = torch.from_numpy(out)
        with copying(self._items.device) as staging:
            rows = self._rows.take(self._placed(indices[low - first_item : high - first_item]))
            flat = rows.reshape(-1)[start : start + len(out)]
            if staging is None:
                host.copy_(flat)
                return
            locked = host if host.is_pinned() else staging.pinned(len(out))
            locked.copy_(flat, non_blocking=True)
            staging.stream.synchronize()
            if locked is not host:
                host.copy_(locked)

    def scatter(self, indices: Indices, first_item: int, offset: int, data: Bytes) -> None:
        import torch

        with copying(self._items.device) as staging:
            source = torch.from_numpy(data).to(self._items.device, non_blocking=True)
            item, start = divmod(offset, self.item_bytes)
            count, rest = divmod(len(data), self.item_bytes)
            if start == 0 and rest == 0:
                slots = self._placed(indices[item - first_item : item - first_item + count])
                self._rows.put(slots, source.reshape(count, self.item_bytes))
            else:
                at = 0
                for piece in pieces(offset, len(data), self.item_bytes):
                    size = piece.stop - piece.start
                    row = int(indices[piece.item - first_item])
                    self._items[row, piece.start : piece.stop].copy_(source[at : at + size])
                    at += size
            if staging is not None:
                staging.stream.synchronize()

    def _placed(self, slots: Indices) -> Any:
        import torch

        return torch.from_numpy(slots).to(self._items.device)
