"""The delta rule's triangular system, chunk by chunk: ``T = (I + L)^-1 diag(beta)``, ``W = T (k 2^G)``, ``U = T v``.

Diagonal 16 x 16 blocks are inverted by forward substitution in float32, all four of a chunk in step; two merges
``T <- T - T L_off T`` make them 32 and then 64 wide. Both are as stable as substitution, unlike powers of L.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prfaas_kernels.common.chunk_rows import chunk_rows
from prfaas_kernels.common.operand import narrow, operand


@triton.jit
def _merge(inverse, lower, C: tl.constexpr, HALF: tl.constexpr, PREC: tl.constexpr):
    """Inverse of blocks of 2 * HALF from the inverse of blocks of HALF; both ``[C, C]``."""
    row = tl.arange(0, C)[:, None]
    col = tl.arange(0, C)[None, :]
    off = (row // (2 * HALF) == col // (2 * HALF)) & (row // HALF > col // HALF)
    left = tl.dot(inverse, tl.where(off, lower, 0.0), input_precision=PREC)
    return inverse - tl.dot(left, inverse, input_precision=PREC)


@triton.jit
def delta_solve_kernel(
    lower,
    w,
    u,
    v,
    beta,
    table,
    cu_seqlens,
    v_t,
    v_h,
    beta_t,
    beta_h,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    RAW_BETA: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    MERGE_PREC: tl.constexpr,
):
    """Grid (chunks, HV). ``lower`` ``[chunks, HV, C, C]`` float32, strictly lower; ``v`` ``[T, HV, V]`` strided.

    ``w`` ``[chunks, HV, C, K]`` holds ``k 2^G`` and receives W in place; ``u`` ``[chunks, HV, C, V]`` receives U.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.load(table + 2 * chunk)
    if n < 0:
        return
    token, live = chunk_rows(table, cu_seqlens, chunk, n, C)
    tile = (chunk.to(tl.int64) * heads + head) * C
    lower += tile * C

    blk = tl.arange(0, C // 16)
    small = tl.arange(0, 16)
    inverse = tl.zeros([C // 16, 16, 16], tl.float32) + tl.where(small[None, :, None] == small[None, None, :], 1.0, 0.0)
    corner = lower + (blk[:, None] * 16) * C + blk[:, None] * 16 + small[None, :]
    for i in range(1, 16):
        weights = -tl.load(corner + i * C)
        row = tl.sum(weights[:, :, None] * inverse, axis=1)
        inverse += tl.where(small[None, :, None] == i, row[:, None, :], 0.0)

    same = blk[:, None, None, None] == blk[None, None, :, None]
    full = tl.where(same, inverse[:, :, None, :], 0.0).reshape(C, C)
    ids = tl.arange(0, C)
    whole = tl.load(lower + ids[:, None] * C + ids[None, :])
    full = _merge(full, whole, C, 16, MERGE_PREC)
    full = _merge(full, whole, C, 32, MERGE_PREC)

    rate = tl.load(beta + token * beta_t + head * beta_h, mask=live, other=0.0).to(tl.float32)
    if RAW_BETA:
        rate = 1.0 / (1.0 + tl.exp(-rate))
    full = operand(full * rate[None, :], DOT)

    part = tl.arange(0, BLOCK)
    for at in range(0, K, BLOCK):
        place = w + tile * K + ids[:, None] * K + at + part[None, :]
        keys = operand(tl.load(place), DOT)
        tl.store(place, narrow(tl.dot(full, keys, input_precision=PREC), w.dtype.element_ty, DOT))
    for at in range(0, V, BLOCK):
        place = v + token[:, None] * v_t + head * v_h + at + part[None, :]
        values = operand(tl.load(place, mask=live[:, None], other=0.0), DOT)
        out = u + tile * V + ids[:, None] * V + at + part[None, :]
        tl.store(out, narrow(tl.dot(full, values, input_precision=PREC), u.dtype.element_ty, DOT))
