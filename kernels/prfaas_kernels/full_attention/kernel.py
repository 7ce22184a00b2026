"""Causal prefill attention over a paged prefix and ragged new tokens in one pass; nothing is gathered or merged.

A program holds ROWS query rows, pairs of (token, head) that share a key head, so that keys are read once for all heads
of a group. Keys of K channels are split into MAIN (a power of two) and EXTRA (the rest, as MLA's rotary part). SHARED:
the values are the MAIN channels of the keys (MLA, absorbed), and are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prfaas_kernels.common.operand import narrow, operand


@triton.jit
def _load_rows(rows, live, MAIN: tl.constexpr, EXTRA: tl.constexpr, DOT: tl.constexpr):
    """Channels MAIN and EXTRA (MAIN again where there are none) of the rows that ``rows`` points to, where ``live``."""
    main = operand(tl.load(rows[:, None] + tl.arange(0, MAIN)[None, :], mask=live[:, None], other=0.0), DOT)
    extra = main
    if EXTRA > 0:
        channel = MAIN + tl.arange(0, EXTRA)
        extra = operand(tl.load(rows[:, None] + channel[None, :], mask=live[:, None], other=0.0), DOT)
    return main, extra


@triton.jit
def _attend(
    acc,
    top,
    total,
    q_main,
    q_extra,
    k_base,
    v_base,
    spot,
    live,
    visible,
    factor,
    k_t,
    v_t,
    MAIN: tl.constexpr,
    EXTRA: tl.constexpr,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
):
    """One block of keys at rows ``spot`` ``[KEYS]`` where ``live``; ``visible`` ``[ROWS, KEYS]``, or live keys only."""
    keys, rest = _load_rows(k_base + spot * k_t, live, MAIN, EXTRA, DOT)
    scores = tl.dot(q_main, tl.trans(keys), input_precision=PREC)
    if EXTRA > 0:
        scores = tl.dot(q_extra, tl.trans(rest), acc=scores, input_precision=PREC)
    scores = tl.where(visible, scores * factor, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(weights, 1)
    if SHARED:
        values = keys
    else:
        column = tl.arange(0, V)
        values = operand(tl.load(v_base + spot[:, None] * v_t + column[None, :], mask=live[:, None], other=0.0), DOT)
    acc = tl.dot(operand(weights, DOT), values, acc=acc * fade[:, None], input_precision=PREC)
    return acc, higher, total


@triton.jit
def prefill_attention_kernel(
    q,
    k,
    v,
    o,
    k_pool,
    v_pool,
    page_table,
    prefix_lens,
    table,
    cu_seqlens,
    factor,
    q_t,
    q_h,
    k_t,
    k_h,
    v_t,
    v_h,
    o_t,
    o_h,
    k_pool_t,
    k_pool_h,
    v_pool_t,
    v_pool_h,
    page_table_n,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PAGE: tl.constexpr,
    MAIN: tl.constexpr,
    EXTRA: tl.constexpr,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    PREFIX: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (token blocks, Hkv * (GROUP // HEADS)). ``q`` ``[T, H, K]``, ``k`` ``[T, Hkv, K]``, ``v`` ``[T, Hkv, V]``.

    A block has TOKENS tokens of one sequence with HEADS of the GROUP heads of a key head: TOKENS * HEADS <= ROWS.
    ``table`` ``[blocks, 2]``: (sequence, block in it) or -1. Prefix token i of sequence n lies at row
    ``page_table[n, i // PAGE] * PAGE + i % PAGE`` of ``k_pool`` ``[slots, Hkv, K]``. ``factor``: scale * log2(e).
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest first
    n = tl.load(table + 2 * block)
    if n < 0:
        return
    splits: tl.constexpr = GROUP // HEADS
    key_head = tl.program_id(1) // splits
    first_head = key_head * GROUP + (tl.program_id(1) % splits) * HEADS
    begin = tl.load(cu_seqlens + n).to(tl.int32)
    length = tl.load(cu_seqlens + n + 1).to(tl.int32) - begin
    first_token = tl.load(table + 2 * block + 1) * TOKENS

    row = tl.arange(0, ROWS)
    token = first_token + row // HEADS
    head = first_head + row % HEADS
    valid = (row < TOKENS * HEADS) & (token < length)
    q_rows = q + (begin + token).to(tl.int64) * q_t + head * q_h
    q_main, q_extra = _load_rows(q_rows, valid, MAIN, EXTRA, DOT)
    acc = tl.zeros([ROWS, V], tl.float32)
    top = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    column = tl.arange(0, KEYS)

    if PREFIX:
        prefix = tl.load(prefix_lens + n).to(tl.int32)
        for at in tl.range(0, prefix, KEYS, num_stages=STAGES):
            index = at + column
            live = index < prefix
            page = tl.load(page_table + n.to(tl.int64) * page_table_n + index // PAGE, mask=live, other=0).to(tl.int64)
            acc, top, total = _attend(
                acc,
                top,
                total,
                q_main,
                q_extra,
                k_pool + key_head * k_pool_h,
                v_pool + key_head * v_pool_h,
                page * PAGE + index % PAGE,
                live,
                live[None, :] & (row >= 0)[:, None],
                factor,
                k_pool_t,
                v_pool_t,
                MAIN,
                EXTRA,
                V,
                SHARED,
                DOT,
                PREC,
            )

    stop = tl.minimum(length, first_token + TOKENS)
    for at in tl.range(0, stop, KEYS, num_stages=STAGES):
        index = at + column
        live = index < stop
        acc, top, total = _attend(
            acc,
            top,
            total,
            q_main,
            q_extra,
            k + key_head * k_h,
            v + key_head * v_h,
            (begin + index).to(tl.int64),
            live,
            live[None, :] & (index[None, :] <= token[:, None]),
            factor,
            k_t,
            v_t,
            MAIN,
            EXTRA,
            V,
            SHARED,
            DOT,
            PREC,
        )

    value = tl.arange(0, V)
    place = o + (begin + token).to(tl.int64)[:, None] * o_t + head[:, None] * o_h + value[None, :]
    tl.store(place, narrow(acc / total[:, None], o.dtype.element_ty, DOT), mask=valid[:, None])
