"""KDA, what a chunk of C tokens contributes before its state is known; one program per (chunk, value head).

G is the cumulative log2 decay inside the chunk, per key channel. Written per chunk and head::

    Qg = scale q 2^G     Kg = k 2^(G_end - G)     Ke = k 2^G     decay = 2^G_end
    A  = tril(scale sum q_i k_j 2^(G_i - G_j))    L = strict_tril(beta_i sum k_i k_j 2^(G_i - G_j))

Decay between two tokens is never formed from a clamped or overflowing exponent. Where every channel decays by less
than SPAN powers of two over the chunk, one product with both factors rescaled at mid-chunk is exact. The launch with
STRONG = False does that, and marks the other (chunk, head) pairs in ``strong``; the launch with STRONG = True does
those again and leaves at once elsewhere. There, pairs are split at block boundaries, halving blocks (64, 32, ... 2)
until a block's decay fits; each block's factors are rescaled at its own middle, so the exponents kept are <= 0 or
within SPAN. G is then held in float64, so that a spike does not spoil the small differences behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prfaas_kernels.common.chunk_rows import chunk_rows, row_scales
from prfaas_kernels.common.operand import narrow, operand

GATE_LOG_DECAY = 0
GATE_SOFTPLUS = 1
GATE_SIGMOID = 2


@triton.jit
def log2_decay(x, rate, lower_bound, GATE: tl.constexpr):
    """Log2 decay (<= 0), float32. ``x``: raw gate with bias, or log decay where GATE is 0; ``rate`` exp(a_log)."""
    if GATE == 1:
        soft = tl.where(x > 20.0, x * 1.4426950408889634, tl.log2(1.0 + tl.exp2(x * 1.4426950408889634)))
        x = -rate * soft
    elif GATE == 2:
        x = (lower_bound * 1.4426950408889634) / (1.0 + tl.exp2(-rate * x * 1.4426950408889634))
    else:
        x = x * 1.4426950408889634
    return x


@triton.jit
def _block_scores(
    scores,
    lower,
    todo,
    q,
    k,
    total,
    C: tl.constexpr,
    BK: tl.constexpr,
    HALF: tl.constexpr,
    SPAN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    """One level: blocks of 2 * HALF tokens, either finished (their decay fits) or split at their middle."""
    if todo > 0:
        blocks = total.reshape(C // (2 * HALF), 2 * HALF, BK)
        middle = tl.arange(0, 2 * HALF)[None, :, None] == HALF - 1
        pivot = tl.sum(tl.where(middle, blocks, 0.0), axis=1)
        shift = (blocks - pivot[:, None, :]).to(tl.float32).reshape(C, BK)
        fits = tl.where(tl.max(tl.max(tl.abs(shift), 1), 0) <= SPAN, 1, 0)
        row = tl.arange(0, C)
        late = ((row // HALF) % 2)[:, None]
        up = late + fits > 0
        down = 1 - late + fits > 0
        rise = tl.where(up, tl.exp2(tl.where(up, shift, 0.0)), 0.0)
        fall = tl.where(down, tl.exp2(tl.where(down, -shift, 0.0)), 0.0)
        keys = tl.trans(operand(k * fall, DOT))
        block = row // (2 * HALF)
        pair = (block[:, None] == block[None, :]) & (row[:, None] >= row[None, :])
        scores += tl.where(pair, tl.dot(operand(q * rise, DOT), keys, input_precision=PREC), 0.0)
        lower += tl.where(pair, tl.dot(operand(k * rise, DOT), keys, input_precision=PREC), 0.0)
        todo = 1 - fits
    return scores, lower, todo


@triton.jit
def _whole_scores(scores, lower, q, k, total, last, C: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr):
    """Add one slice's pair sums where the decay over the chunk fits SPAN: one product, rescaled at mid-chunk.

    ``total`` G ``[C, BK]``, ``last`` G_end ``[BK]``; pairs j > i hold anything. Also 2^G and 2^(G_end - G).
    """
    row = tl.arange(0, C)
    pivot = tl.sum(tl.where(row[:, None] == C // 2 - 1, total, 0.0), axis=0)
    kept = tl.exp2(total)
    rest = tl.exp2(last[None, :] - total)
    tail = tl.trans(operand(k * (rest * tl.exp2(pivot - last)[None, :]), DOT))
    lift = kept * tl.exp2(-pivot)[None, :]
    scores = tl.dot(operand(q * lift, DOT), tail, acc=scores, input_precision=PREC)
    lower = tl.dot(operand(k * lift, DOT), tail, acc=lower, input_precision=PREC)
    return scores, lower, kept, rest


@triton.jit
def _split_scores(
    scores,
    lower,
    q,
    k,
    total,
    C: tl.constexpr,
    BK: tl.constexpr,
    SPAN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    """Add one slice's pair sums for any decay; ``q``, ``k`` ``[C, BK]`` float32, ``total`` G in float64."""
    todo = tl.full([], 1, tl.int32)
    scores, lower, todo = _block_scores(scores, lower, todo, q, k, total, C, BK, C // 2, SPAN, DOT, PREC)
    scores, lower, todo = _block_scores(scores, lower, todo, q, k, total, C, BK, C // 4, SPAN, DOT, PREC)
    scores, lower, todo = _block_scores(scores, lower, todo, q, k, total, C, BK, C // 8, SPAN, DOT, PREC)
    scores, lower, todo = _block_scores(scores, lower, todo, q, k, total, C, BK, C // 16, SPAN, DOT, PREC)
    scores, lower, todo = _block_scores(scores, lower, todo, q, k, total, C, BK, C // 32, SPAN, DOT, PREC)
    scores, lower, todo = _block_scores(scores, lower, todo, q, k, total, C, BK, C // 64, SPAN, DOT, PREC)
    if todo > 0:
        row = tl.arange(0, C)
        scores += tl.where(row[:, None] == row[None, :], tl.sum(q * k, axis=1)[:, None], 0.0)
    return scores, lower


@triton.jit
def kda_prep_kernel(
    q,
    k,
    g,
    beta,
    a_log,
    dt_bias,
    table,
    cu_seqlens,
    qg,
    kg,
    ke,
    scores_out,
    lower_out,
    decay,
    strong,
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
    lower_bound,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RAW_BETA: tl.constexpr,
    L2NORM: tl.constexpr,
    STRONG: tl.constexpr,
    SPAN: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    """Grid (chunks, HV). ``q``, ``k`` ``[T, HV // GROUP, K]``, ``g`` ``[T, HV, K]``, ``beta`` ``[T, HV]``, strided.

    Tiles ``[chunks, HV, C, .]`` are written whole: rows past a sequence's end are zeros (no decay, no keys).
    """
    chunk = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.load(table + 2 * chunk)
    if n < 0:
        return
    if STRONG:  # noqa: SIM102  (a constexpr: the load must not be compiled otherwise)
        if tl.load(strong + chunk * heads + head) == 0:
            return
    token, live = chunk_rows(table, cu_seqlens, chunk, n, C)
    row = tl.arange(0, C)
    part = tl.arange(0, BK)
    mask = live[:, None]
    q_rows = q + token[:, None] * q_t + (head // GROUP) * q_h + part[None, :]
    k_rows = k + token[:, None] * k_t + (head // GROUP) * k_h + part[None, :]
    g_rows = g + token[:, None] * g_t + head * g_h + part[None, :]
    tile = chunk.to(tl.int64) * heads + head
    place = tile * (C * K) + row[:, None] * K + part[None, :]

    q_scale, k_scale = row_scales(q_rows, k_rows, mask, scale, C, K, BK, L2NORM)
    rate = 1.0
    if GATE > 0:
        rate = tl.exp(tl.load(a_log + head).to(tl.float32))

    least = tl.zeros([BK], tl.float32)
    scores = tl.zeros([C, C], tl.float32)
    lower = tl.zeros([C, C], tl.float32)
    for at in range(0, K, BK):
        x = tl.load(g_rows + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(dt_bias + head * K + at + part).to(tl.float32)[None, :]
        x = tl.where(mask, log2_decay(x, rate, lower_bound, GATE), 0.0)
        queries = tl.load(q_rows + at, mask=mask, other=0.0).to(tl.float32) * q_scale[:, None]
        keys = tl.load(k_rows + at, mask=mask, other=0.0).to(tl.float32) * k_scale[:, None]
        last = tl.sum(x, axis=0)
        if STRONG:
            total = tl.cumsum(x.to(tl.float64), axis=0)
            bottom = tl.sum(tl.where(row[:, None] == C - 1, total, 0.0), axis=0)
            kept = tl.exp2(total.to(tl.float32))
            rest = tl.exp2((bottom[None, :] - total).to(tl.float32))
            scores, lower = _split_scores(scores, lower, queries, keys, total, C, BK, SPAN, DOT, PREC)
        else:
            least = tl.minimum(least, last)
            total = tl.cumsum(x, axis=0)
            scores, lower, kept, rest = _whole_scores(scores, lower, queries, keys, total, last, C, DOT, PREC)
        tl.store(qg + place + at, narrow(queries * kept, qg.dtype.element_ty, DOT))
        tl.store(ke + place + at, narrow(keys * kept, ke.dtype.element_ty, DOT))
        tl.store(kg + place + at, narrow(keys * rest, kg.dtype.element_ty, DOT))
        tl.store(decay + tile * K + at + part, tl.exp2(last))

    if not STRONG:
        tl.store(strong + chunk * heads + head, tl.where(tl.min(least, 0) >= -SPAN, 0, 1))
        scores = tl.where(row[:, None] >= row[None, :], scores, 0.0)
    strength = tl.load(beta + token * beta_t + head * beta_h, mask=live, other=0.0).to(tl.float32)
    if RAW_BETA:
        strength = 1.0 / (1.0 + tl.exp(-strength))
    lower = tl.where(row[:, None] > row[None, :], lower * strength[:, None], 0.0)
    square = tile * (C * C) + row[:, None] * C + row[None, :]
    tl.store(scores_out + square, narrow(scores, scores_out.dtype.element_ty, DOT))
    tl.store(lower_out + square, lower)
