"""Pack rows of all layers into one buffer and back: Triton on the GPU, torch elsewhere; the bytes are the same.

Format. Plain: ``[L, R, row_bytes]`` uint8, the rows' bytes as they lie in the pools. Quantised: each row is cut into
groups of ``width`` elements (a token of one layer for MLA latents, a (head, V row) of a state): int8 or float8_e4m3fn
``[L, R, groups, width]`` and float32 scales ``[L, R, groups]``; value = code * scale.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

from prfaas_kernels.kv_pack.pools import PoolTable

WORD_BYTES = 4
BLOCK_WORDS = 4096
#: Largest magnitude of each code.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class QuantisedRows(NamedTuple):
    """``codes`` ``[L, R, groups, width]`` int8 or float8_e4m3fn, ``scales`` ``[L, R, groups]`` float32."""

    codes: torch.Tensor
    scales: torch.Tensor


def _on_triton(device: torch.device) -> bool:
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET", "0") == "1"


def _check_packed(table: PoolTable, indices: torch.Tensor, packed: torch.Tensor) -> None:
    want = (len(table.pools), indices.shape[0], table.row_bytes)
    if packed.shape != want or packed.dtype != torch.uint8 or not packed.is_contiguous():
        raise ValueError(f"expected contiguous uint8 {want}, got {packed.dtype} {tuple(packed.shape)}")


def _copy(table: PoolTable, indices: torch.Tensor, packed: torch.Tensor, *, gather: bool) -> None:
    from prfaas_kernels.kv_pack.copy_rows import copy_rows_kernel

    rows, words = indices.shape[0], table.row_bytes // WORD_BYTES
    if rows == 0:
        return
    block = min(BLOCK_WORDS, 1 << (words - 1).bit_length())
    copy_rows_kernel[(rows, -(-words // block), len(table.pools))](
        table.addresses,
        table.strides_bytes,
        indices,
        packed.view(torch.int32),
        rows,
        words,
        BLOCK=block,
        ALIGNED=table.aligned,
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
    _check_packed(table, indices, out)
    if _on_triton(device):
        _copy(table, indices, out, gather=True)
        return out
    live = indices >= 0
    for layer, pool in enumerate(table.pools):
        rows = pool[indices[live].long()].contiguous()
        out[layer, live] = rows.view(torch.uint8).view(rows.shape[0], table.row_bytes)
    return out


def unpack_rows(table: PoolTable, indices: torch.Tensor, packed: torch.Tensor | QuantisedRows) -> None:
    """Write packed rows to rows ``indices`` ``[R]`` of all pools; negative indices are skipped, none may repeat."""
    device = table.pools[0].device
    if isinstance(packed, QuantisedRows):
        _dequantise(table, indices, packed)
        return
    _check_packed(table, indices, packed)
    if _on_triton(device):
        _copy(table, indices, packed, gather=False)
        return
    live = indices >= 0
    for layer, pool in enumerate(table.pools):
        rows = packed[layer, live].contiguous().view(pool.dtype)
        pool[indices[live].long()] = rows.view(-1, *pool.shape[1:])


def quantise_rows(
    table: PoolTable, indices: torch.Tensor, *, width: int, code: torch.dtype = torch.int8
) -> QuantisedRows:
    """As :func:`pack_rows`, in groups of ``width`` elements with a scale each; ``code`` int8 or float8_e4m3fn.

    Raises ValueError where ``width`` does not divide a row or ``code`` is another dtype.
    """
    pool = table.pools[0]
    elements = table.row_bytes // pool.element_size()
    if code not in LARGEST or elements % width:
        raise ValueError(f"expected int8 or float8_e4m3fn and a width that divides {elements}, got {code}, {width}")
    layers, rows, groups = len(table.pools), indices.shape[0], elements // width
    codes = torch.zeros(layers, rows, groups, width, dtype=code, device=pool.device)
    scales = torch.ones(layers, rows, groups, dtype=torch.float32, device=pool.device)
    if rows and _on_triton(pool.device):
        from prfaas_kernels.kv_pack.copy_rows import quantise_rows_kernel

        quantise_rows_kernel[(rows, groups, layers)](
            table.addresses,
            table.strides_bytes,
            indices,
            codes,
            scales,
            pool,
            rows,
            groups,
            WIDTH=width,
            BLOCK=1 << (width - 1).bit_length(),
            LARGEST=LARGEST[code],
            ROUND=code == torch.int8,
            num_warps=1 if width <= 256 else 4,
        )
    elif rows:
        live = indices >= 0
        for layer, source in enumerate(table.pools):
            x = source[indices[live].long()].float().reshape(-1, groups, width)
            largest = x.abs().amax(-1)
            scale = torch.where(largest > 0, largest / LARGEST[code], 1.0)
            x = x / scale.unsqueeze(-1)
            codes[layer, live] = ((x + 0.5).floor() if code == torch.int8 else x).to(code)
            scales[layer, live] = scale
    return QuantisedRows(codes, scales)


def _dequantise(table: PoolTable, indices: torch.Tensor, packed: QuantisedRows) -> None:
    pool = table.pools[0]
    layers, rows, groups, width = packed.codes.shape
    if rows and _on_triton(pool.device):
        from prfaas_kernels.kv_pack.copy_rows import dequantise_rows_kernel

        dequantise_rows_kernel[(rows, groups, layers)](
            table.addresses,
            table.strides_bytes,
            indices,
            packed.codes,
            packed.scales,
            pool,
            rows,
            groups,
            WIDTH=width,
            BLOCK=1 << (width - 1).bit_length(),
            num_warps=1 if width <= 256 else 4,
        )
        return
    live = indices >= 0
    for layer, target in enumerate(table.pools):
        x = packed.codes[layer, live].float() * packed.scales[layer, live].unsqueeze(-1)
        target[indices[live].long()] = x.reshape(-1, *target.shape[1:]).to(target.dtype)
