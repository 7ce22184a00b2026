"""What a chunk contributes where one gate decays all key channels of a head: GDN and Lightning.

As :mod:`prfaas_kernels.kda.prep`, but decays between tokens are differences of one number per token, formed in float64
and never positive, so no rescaling is needed::

    Qg = scale q 2^G     Kg = k 2^(G_end - G)     Ke = k 2^G     decay = 2^G_end
    A  = tril(scale q k^T 2^(G_i - G_j))          L = strict_tril(beta_i k k^T 2^(G_i - G_j))
"""

from __future__ import annotations

import triton
import triton.language as tl

from prfaas_kernels.common.chunk_rows import chunk_rows, row_scales
from prfaas_kernels.common.operand import narrow, operand


@triton.jit
def scalar_prep_kernel(
    q,
    k,
    g,
    beta,
    table,
    cu_seqlens,
    qg,
    kg,
    ke,
    scores_out,
    lower_out,
    decay,
    q_t,
    q_h,
    k_t,
    k_h,
    g_t,
    g_h,
    beta_t,
    beta_h,
    heads,
    scale,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DELTA: tl.constexpr,
    FIXED: tl.constexpr,
    L2NORM: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    """Grid (chunks, HV). ``q``, ``k`` ``[T, HV // GROUP, K]``, ``beta`` ``[T, HV]`` activated.

    ``g`` ``[T, HV]`` log decay, or with FIXED ``[HV]``: minus the log decay of every token. Without DELTA ``ke`` and
    ``lower_out`` are not written.
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.load(table + 2 * chunk)
    if n < 0:
        return
    token, live = chunk_rows(table, cu_seqlens, chunk, n, C)
    row = tl.arange(0, C)
    part = tl.arange(0, BK)
    mask = live[:, None]
    q_rows = q + token[:, None] * q_t + (head // GROUP) * q_h + part[None, :]
    k_rows = k + token[:, None] * k_t + (head // GROUP) * k_h + part[None, :]
    tile = chunk.to(tl.int64) * heads + head
    place = tile * (C * K) + row[:, None] * K + part[None, :]

    if FIXED:
        x = tl.where(live, -tl.load(g + head).to(tl.float32), 0.0)
    else:
        x = tl.load(g + token * g_t + head * g_h, mask=live, other=0.0).to(tl.float32)
    x = x.to(tl.float64) * 1.4426950408889634
    total = tl.cumsum(x, axis=0)
    bottom = tl.sum(x, axis=0)
    kept = tl.exp2(total.to(tl.float32))
    rest = tl.exp2((bottom - total).to(tl.float32))
    causal = row[:, None] >= row[None, :]
    between = tl.exp2(tl.where(causal, (total[:, None] - total[None, :]).to(tl.float32), float("-inf")))

    q_scale, k_scale = row_scales(q_rows, k_rows, mask, scale, C, K, BK, L2NORM)
    scores = tl.zeros([C, C], tl.float32)
    lower = tl.zeros([C, C], tl.float32)
    for at in range(0, K, BK):
        queries = tl.load(q_rows + at, mask=mask, other=0.0).to(tl.float32) * q_scale[:, None]
        keys = tl.load(k_rows + at, mask=mask, other=0.0).to(tl.float32) * k_scale[:, None]
        factor = operand(keys, DOT)
        scores = tl.dot(operand(queries, DOT), tl.trans(factor), acc=scores, input_precision=PREC)
        tl.store(qg + place + at, narrow(queries * kept[:, None], qg.dtype.element_ty, DOT))
        tl.store(kg + place + at, narrow(keys * rest[:, None], kg.dtype.element_ty, DOT))
        tl.store(decay + tile * K + at + part, tl.zeros([BK], tl.float32) + tl.exp2(bottom.to(tl.float32)))
        if DELTA:
            lower = tl.dot(factor, tl.trans(factor), acc=lower, input_precision=PREC)
            tl.store(ke + place + at, narrow(keys * kept[:, None], ke.dtype.element_ty, DOT))
    square = tile * (C * C) + row[:, None] * C + row[None, :]
    tl.store(scores_out + square, narrow(scores * between, scores_out.dtype.element_ty, DOT))
    if DELTA:
        strength = tl.load(beta + token * beta_t + head * beta_h, mask=live, other=0.0).to(tl.float32)
        strict = row[:, None] > row[None, :]
        tl.store(lower_out + square, tl.where(strict, lower * between * strength[:, None], 0.0))
