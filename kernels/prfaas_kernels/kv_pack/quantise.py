"""Quantise rows of many pools into one buffer and back, in the format of :mod:`prfaas_kernels.kv_pack.codec`."""

from __future__ import annotations

import triton
import triton.language as tl

from prfaas_kernels.common.operand import narrow


@triton.jit
def _e4m3_code(x):
    """float32 ``x``, at most 448 in magnitude, to the bits of float8_e4m3fn; zero has no sign.

    By integer arithmetic: casts to float8 need compute capability 8.9, and the interpreter's drops carries.
    """
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits & 0x7FFFFFFF) + 0x7FFFF + ((bits >> 20) & 1)
    normal = (nearest >> 20) - (120 << 3)
    tiny = ((tl.abs(x) + 24576.0) - 24576.0) * 512.0  # to a multiple of 2^-9, the step of its subnormals
    code = tl.where(tl.abs(x) < 0.015625, tiny.to(tl.uint32), normal)
    return tl.where(code == 0, 0, code | ((bits >> 31) << 7)).to(tl.uint8)


@triton.jit
def _e4m3_value(code):
    """float32 value of the bits of float8_e4m3fn."""
    bits = code.to(tl.uint32)
    magnitude = bits & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    # Not -value, which Triton 3.6 makes of 0 - value: that has another zero.
    return (value.to(tl.uint32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _row_start(addresses, strides, pool, index, kind, UNIT: tl.constexpr):
    """Address of row ``index`` of ``pool`` as a pointer of the type of ``kind``."""
    place = (tl.load(addresses + pool) + index * tl.load(strides + pool)).to(tl.pointer_type(kind.dtype.element_ty))
    if UNIT == 16:
        place = tl.multiple_of(place, 16)
    return place


@triton.jit
def _elements(groups, WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUPS: tl.constexpr):
    """This program's groups ``[GROUPS]``; its elements' places in the row and which exist, ``[GROUPS, BLOCK]``."""
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK)
    mask = (group < groups)[:, None] & (column < WIDTH)[None, :]
    return group, group[:, None] * WIDTH + column[None, :], mask


@triton.jit
def quantise_rows_kernel(
    addresses,
    strides,
    indices,
    codes,
    scales,
    kind,
    rows,
    groups,
    row_units,
    scales_word,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    INT8: tl.constexpr,
):
    """Grid (rows, blocks of GROUPS groups, pools). ``codes`` ``[pools, rows, row_units * UNIT]`` uint8.

    ``scales``: the same memory as float32; a row's begin at its word ``scales_word``. ``kind``: a pointer of the
    pools' dtype, not read. Indices < 0 are skipped. UNIT is 16 where all rows, encoded ones too, and addresses are
    multiples of 16 bytes, else 4.
    """
    row = tl.program_id(0)
    pool = tl.program_id(2).to(tl.int64)
    index = tl.load(indices + row).to(tl.int64)
    if index < 0:
        return
    row_bytes = row_units * UNIT
    place = _row_start(addresses, strides, pool, index, kind, UNIT)
    group, at, mask = _elements(groups, WIDTH, BLOCK, GROUPS)
    x = tl.load(place + at, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 1)
    finite = tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 1) == 0
    usual = finite & (largest >= TINY)
    scale = tl.where(usual, tl.div_rn(largest, tl.full([GROUPS], LARGEST, tl.float32)), 1.0)
    q = tl.where(usual[:, None], tl.div_rn(x, tl.zeros([GROUPS, BLOCK], tl.float32) + scale[:, None]), 0.0)
    code = tl.floor(q + 0.5).to(tl.int8).to(tl.uint8, bitcast=True) if INT8 else _e4m3_code(q)
    out = pool * rows + row
    tl.store(codes + out * row_bytes + at, code, mask=mask)
    scale = tl.where(finite, scale, float("nan"))
    tl.store(scales + out * (row_bytes // 4) + scales_word + group, scale, mask=group < groups)


@triton.jit
def dequantise_rows_kernel(
    addresses,
    strides,
    indices,
    codes,
    scales,
    kind,
    rows,
    groups,
    row_units,
    scales_word,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    UNIT: tl.constexpr,
    INT8: tl.constexpr,
):
    """The inverse of :func:`quantise_rows_kernel`, into the pools."""
    row = tl.program_id(0)
    pool = tl.program_id(2).to(tl.int64)
    index = tl.load(indices + row).to(tl.int64)
    if index < 0:
        return
    row_bytes = row_units * UNIT
    place = _row_start(addresses, strides, pool, index, kind, UNIT)
    group, at, mask = _elements(groups, WIDTH, BLOCK, GROUPS)
    out = pool * rows + row
    code = tl.load(codes + out * row_bytes + at, mask=mask, other=0)
    scale = tl.load(scales + out * (row_bytes // 4) + scales_word + group, mask=group < groups, other=0.0)
    value = code.to(tl.int8, bitcast=True).to(tl.float32) if INT8 else _e4m3_value(code)
    # The interpreter truncates to bfloat16: it is rounded first, which changes nothing on a GPU.
    tl.store(place + at, narrow(value * scale[:, None], kind.dtype.element_ty, "bf16_in_fp32"), mask=mask)
