"""FP8 and INT8 on the wire: the quantised rows of `prfaas_kernels.kv_pack`, one row an item."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.codec.base import ELEMENT_BYTES
from sglang_prfaas.transport.memory import Bytes

LARGEST_WIDTH = 128
"""Most elements that share a scale."""
SMALLEST_WIDTH = 16
"""Fewest; with fewer still, scales would take a fifth of the bytes and more."""
BLOCK_ELEMENTS = 1 << 17
"""Elements that a CPU works on at a time, so that they stay in its cache."""


def group_width(elements: int) -> int:
    """Elements that share a scale in an item of `elements`: the largest power of two up to 128 that divides them, or,
    where that is below 64, the largest number up to 128 that does. 0 where that is below 16."""
    power = elements & -elements
    if power >= LARGEST_WIDTH // 2:
        return min(power, LARGEST_WIDTH)
    return next((width for width in range(LARGEST_WIDTH, SMALLEST_WIDTH - 1, -1) if elements % width == 0), 0)


class Quantised:
    """Codes of one byte with a float32 scale for each group. `code`: fp8 (e4m3fn) or int8. Raises ImportError without
    torch and `prfaas_kernels`."""

    def __init__(self, code: str, dtype: str, item_bytes: int) -> None:
        import torch
        from prfaas_kernels.kv_pack.codec import encoded_row_bytes

        self.item_bytes = item_bytes
        self._elements = item_bytes // ELEMENT_BYTES[dtype]
        self._width = group_width(self._elements)
        self._row_bytes: int = encoded_row_bytes(self._elements, self._width)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._code = torch.int8 if code == "int8" else torch.float8_e4m3fn

    def least_bytes(self, items: int) -> int:
        return items * self._row_bytes

    def most_bytes(self, items: int) -> int:
        return items * self._row_bytes

    def encode(self, raw: Any) -> Bytes | None:
        import torch
        from prfaas_kernels.kv_pack.codec import encode_rows

        rows = (torch.from_numpy(raw) if isinstance(raw, np.ndarray) else raw).view(self._dtype)
        found: Bytes = np.empty((len(rows), self._row_bytes), np.uint8)
        out = torch.from_numpy(found)
        for block in self._blocks(len(rows), rows.device.type):
            out[block] = encode_rows(rows[block], width=self._width, code=self._code).to("cpu")
        return found.reshape(-1)

    def decode(self, payload: Bytes, out: Bytes) -> None:
        import torch
        from prfaas_kernels.kv_pack.codec import decode_rows

        if len(payload) != len(out) * self._row_bytes:
            raise ProtocolError(
                f"{len(out)} encoded items have {len(payload)} bytes, expected {len(out) * self._row_bytes}"
            )
        rows = torch.from_numpy(payload.reshape(len(out), self._row_bytes))
        found = torch.from_numpy(out).view(self._dtype)
        for block in self._blocks(len(rows), "cpu"):
            found[block] = decode_rows(
                rows[block], elements=self._elements, width=self._width, code=self._code, dtype=self._dtype
            )

    def _blocks(self, rows: int, device: str) -> list[slice]:
        step = max(1, BLOCK_ELEMENTS // self._elements) if device == "cpu" else max(1, rows)
        return [slice(at, at + step) for at in range(0, rows, step)]
