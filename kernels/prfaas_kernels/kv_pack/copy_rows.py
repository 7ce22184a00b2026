"""Copy rows between pools and one packed buffer. Grid (rows, blocks of a row, pools)."""

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
    units,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    GATHER: tl.constexpr,
):
    """``packed`` ``[pools, rows, units * UNIT]`` int32; GATHER fills it, else it is scattered. Indices < 0 are skipped.

    UNIT is 4 where all rows and addresses are multiples of 16 bytes, so that accesses are 16 bytes wide, else 1.
    """
    row = tl.program_id(0)
    pool = tl.program_id(2).to(tl.int64)
    index = tl.load(indices + row).to(tl.int64)
    if index < 0:
        return
    place = (tl.load(addresses + pool) + index * tl.load(strides + pool)).to(tl.pointer_type(tl.int32))
    words = units * UNIT
    if UNIT == 4:
        place = tl.multiple_of(place, 16)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = word < words
    spot = packed + (pool * rows + row) * words + word
    if GATHER:
        tl.store(spot, tl.load(place + word, mask=mask), mask=mask)
    else:
        tl.store(place + word, tl.load(spot, mask=mask), mask=mask)
