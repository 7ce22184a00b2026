"""Pack rows of all layers into one buffer and back: Triton on the GPU, torch elsewhere; the bytes are the same.

Plain rows: ``[L, R, row_bytes]`` uint8, the bytes as they lie in the pools. Quantised rows:
``[L, R, encoded_row_bytes]`` uint8 in the format of :mod:`prfaas_kernels.kv_pack.codec`.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from prfaas_kernels.kv_pack.codec import (
    LARGEST,
    TINY,
    check_code,
    decode_rows,
    encode_rows,
    encoded_row_bytes,
    scales_offset_bytes,
)
from prfaas_kernels.kv_pack.pools import PoolTable

WORD_BYTES = 4
BLOCK_WORDS = 4096
#: Elements that a program quantises.
BLOCK_ELEMENTS = 2048


def _on_triton(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET", "0") == "1"


def _check_packed(table: PoolTable, indices: torch.Tensor, packed: torch.Tensor, row_bytes: int) -> None:
    want = (len(table.pools), indices.shape[0], row_bytes)
    if packed.shape != want or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"expected contiguous uint8 {want}, got {packed.dtype} {tuple(packed.shape)}")


def _copy(table: PoolTable, indices: torch.Tensor, packed: torch.Tensor, *, gather: bool) -> None:
    from prfaas_kernels.kv_pack.copy_rows import copy_rows_kernel

    rows, words = indices.shape[0], table.row_bytes // WORD_BYTES
    if rows == 0:
        return
    unit = 4 if table.aligned else 1
    block = min(BLOCK_WORDS, 1 << (words - 1).bit_length())
    copy_rows_kernel[(rows, -(-words // block), len(table.pools))](
        table.addresses,
        table.strides_bytes,
        indices,
        packed.view(torch.int32),
        rows,
        words // unit,
        BLOCK=block,
        UNIT=unit,
        GATHER=gather,
        num_warps=8 if block >= 2048 else 4,
    )


def pack_rows(table: PoolTable, indices: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Rows ``indices`` ``[R]`` (int32 or int64, on the pools' device) of all pools: ``[L, R, row_bytes]`` uint8.

    Rows with a negative index are left as ``out`` has them (zeros in a fresh buffer).
    """
    device = table.pools[0].device
    if out is None:
        out = torch.zeros(len(table.pools), indices.shape[0], table.row_bytes, dtype=torch.uint8, device=device)
    _check_packed(table, indices, out, table.row_bytes)
    if _on_triton(device):
        _copy(table, indices, out, gather=True)
        return out
    live = indices >= 0
    for layer, pool in enumerate(table.pools):
        rows = pool[indices[live].long()].contiguous()
        out[layer, live] = rows.view(torch.uint8).view(rows.shape[0], table.row_bytes)
    return out


def unpack_rows(table: PoolTable, indices: torch.Tensor, packed: torch.Tensor) -> None:
    """Write packed rows to rows ``indices`` ``[R]`` of all pools; negative indices are skipped, none may repeat."""
    device = table.pools[0].device
    _check_packed(table, indices, packed, table.row_bytes)
    if _on_triton(device):
        _copy(table, indices, packed, gather=False)
        return
    live = indices >= 0
    for layer, pool in enumerate(table.pools):
        rows = packed[layer, live].contiguous().view(pool.dtype)
        pool[indices[live].long()] = rows.view(-1, *pool.shape[1:])


def _quantised_shape(table: PoolTable, width: int, code: torch.dtype) -> tuple[int, int]:
    """Elements of a row, and bytes of it encoded. Raises ValueError as :func:`quantise_rows` does."""
    check_code(code)
    elements = table.row_bytes // table.pools[0].element_size()
    return elements, encoded_row_bytes(elements, width)


def _launch(
    kernel: Any, table: PoolTable, indices: torch.Tensor, data: torch.Tensor, width: int, **constants: Any
) -> None:
    layers, rows, row_bytes = data.shape
    elements = table.row_bytes // table.pools[0].element_size()
    block = 1 << (width - 1).bit_length()
    together = max(1, min(BLOCK_ELEMENTS // block, 1 << (elements // width - 1).bit_length()))
    unit = 16 if table.aligned and row_bytes % 16 == 0 else WORD_BYTES
    if rows == 0:
        return
    kernel[(rows, -(-(elements // width) // together), layers)](
        table.addresses,
        table.strides_bytes,
        indices,
        data,
        data.view(torch.float32),
        table.pools[0],
        rows,
        elements // width,
        row_bytes // unit,
        scales_offset_bytes(elements) // WORD_BYTES,
        WIDTH=width,
        BLOCK=block,
        GROUPS=together,
        UNIT=unit,
        **constants,
        num_warps=4,
    )


def quantise_rows(
    table: PoolTable,
    indices: torch.Tensor,
    *,
    width: int,
    code: torch.dtype = torch.int8,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As :func:`pack_rows`, in groups of ``width`` elements with a scale each; ``code`` int8 or float8_e4m3fn.

    Returns ``[L, R, encoded_row_bytes]`` uint8; padding bytes are left as ``out`` has them (zeros in a fresh buffer).
    Raises ValueError where ``width`` does not divide a row, ``code`` is another dtype or ``out`` has another shape.
    """
    elements, size = _quantised_shape(table, width, code)
    device = table.pools[0].device
    if out is None:
        out = torch.zeros(len(table.pools), indices.shape[0], size, dtype=torch.uint8, device=device)
    _check_packed(table, indices, out, size)
    if _on_triton(device):
        from prfaas_kernels.kv_pack.quantise import quantise_rows_kernel

        _launch(
            quantise_rows_kernel,
            table,
            indices,
            out,
            width,
            LARGEST=LARGEST[code],
            TINY=TINY,
            INT8=code == torch.int8,
        )
        return out
    live = indices >= 0
    for layer, pool in enumerate(table.pools):
        rows = pool[indices[live].long()].reshape(-1, elements)
        out[layer, live] = encode_rows(rows, width=width, code=code)
    return out


def dequantise_rows(
    table: PoolTable, indices: torch.Tensor, data: torch.Tensor, *, width: int, code: torch.dtype = torch.int8
) -> None:
    """Write rows that :func:`quantise_rows` made to rows ``indices`` ``[R]`` of all pools; as :func:`unpack_rows`."""
    elements, size = _quantised_shape(table, width, code)
    _check_packed(table, indices, data, size)
    if _on_triton(table.pools[0].device):
        from prfaas_kernels.kv_pack.quantise import dequantise_rows_kernel

        _launch(dequantise_rows_kernel, table, indices, data, width, INT8=code == torch.int8)
        return
    live = indices >= 0
    for layer, pool in enumerate(table.pools):
        rows = decode_rows(data[layer, live], elements=elements, width=width, code=code, dtype=pool.dtype)
        pool[indices[live].long()] = rows.reshape(-1, *pool.shape[1:])
