"""Copy rows between pools and one packed buffer; quantise them on the way. Grid (rows, blocks of a row, pools)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows_kernel(
    addresses,
    strides,
    indices,
    packed,
    rows,
    words,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    GATHER: tl.constexpr,
):
    """``packed`` ``[pools, rows, words]`` int32; GATHER fills it, else it is scattered. Indices < 0 are skipped."""
    row = tl.program_id(0)
    pool = tl.program_id(2).to(tl.int64)
    index = tl.load(indices + row).to(tl.int64)
    if index < 0:
        return
    place = (tl.load(addresses + pool) + index * tl.load(strides + pool)).to(tl.pointer_type(tl.int32))
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = word < words
    spot = packed + (pool * rows + row) * words + word
    if GATHER:
        tl.store(spot, tl.load(place + word, mask=mask), mask=mask)
    else:
        tl.store(place + word, tl.load(spot, mask=mask), mask=mask)


@triton.jit
def _nearest_e4m3(x):
    """float32 ``x``, at most 448, rounded to what float8_e4m3fn holds; the interpreter's own cast drops carries."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000
    tiny = (x + 24576.0) - 24576.0  # to a multiple of 2^-9, the step of its subnormals
    return tl.where(tl.abs(x) < 0.015625, tiny, bits.to(tl.float32, bitcast=True))


@triton.jit
def quantise_rows_kernel(
    addresses,
    strides,
    indices,
    packed,
    scales,
    kind,
    rows,
    groups,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Grid (rows, groups, pools). ``packed`` ``[pools, rows, groups, WIDTH]``, ``scales`` ``[pools, rows, groups]``.

    A group is scaled so that its largest magnitude becomes LARGEST. ``kind``: a pointer of the pools' dtype, not read.
    """
    row = tl.program_id(0)
    group = tl.program_id(1)
    pool = tl.program_id(2).to(tl.int64)
    index = tl.load(indices + row).to(tl.int64)
    if index < 0:
        return
    place = (tl.load(addresses + pool) + index * tl.load(strides + pool)).to(tl.pointer_type(kind.dtype.element_ty))
    at = tl.arange(0, BLOCK)
    mask = at < WIDTH
    x = tl.load(place + group * WIDTH + at, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    scale = tl.where(largest > 0.0, tl.div_rn(largest, LARGEST), 1.0)
    x = tl.div_rn(x, scale)
    x = tl.floor(x + 0.5) if ROUND else _nearest_e4m3(x)
    out = (pool * rows + row) * groups + group
    tl.store(packed + out * WIDTH + at, x.to(packed.dtype.element_ty), mask=mask)
    tl.store(scales + out, scale)


@triton.jit
def dequantise_rows_kernel(
    addresses,
    strides,
    indices,
    packed,
    scales,
    kind,
    rows,
    groups,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The inverse of :func:`quantise_rows_kernel`, into the pools."""
    row = tl.program_id(0)
    group = tl.program_id(1)
    pool = tl.program_id(2).to(tl.int64)
    index = tl.load(indices + row).to(tl.int64)
    if index < 0:
        return
    place = (tl.load(addresses + pool) + index * tl.load(strides + pool)).to(tl.pointer_type(kind.dtype.element_ty))
    at = tl.arange(0, BLOCK)
    mask = at < WIDTH
    out = (pool * rows + row) * groups + group
    x = tl.load(packed + out * WIDTH + at, mask=mask, other=0.0).to(tl.float32) * tl.load(scales + out)
    tl.store(place + group * WIDTH + at, x.to(kind.dtype.element_ty), mask=mask)
