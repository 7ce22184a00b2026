"""The serial pass over chunks, output fused: shared by KDA, GDN and Lightning.

::

    V' = U - W S            (V' = v without a delta rule)
    O  = Qg S + A V'
    S  = decay * S + Kg^T V'

A program takes a whole sequence, or a segment of one whose start :mod:`prfaas_kernels.common.segment_scan` has found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prfaas_kernels.common.chunk_rows import resume_state
from prfaas_kernels.common.operand import narrow, operand


@triton.jit
def state_scan_kernel(
    qg,
    kg,
    w,
    u,
    scores,
    decay,
    o,
    pool,
    slots,
    warm,
    cu_seqlens,
    first,
    chunk_states,
    track_state,
    track_index,
    track_slots,
    segments,
    starts,
    segment_chunks,
    u_t,
    u_h,
    o_t,
    o_h,
    pool_s,
    pool_h,
    pool_k,
    pool_v,
    track_s,
    track_h,
    track_k,
    track_v,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_WARM: tl.constexpr,
    STORE_STATE: tl.constexpr,
    KEEP_STARTS: tl.constexpr,
    TRACK: tl.constexpr,
    TRACK_SLOTS: tl.constexpr,
    SEGMENTED: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (V // BV, runs * H); a run is a sequence or, SEGMENTED, a row of ``segments``. S ``[K, BV]`` float32 stays
    in registers. Workspace tiles ``[chunks, H, C, .]``.

    ``qg``, ``kg``, ``w`` ``[.., C, K]``, ``u`` ``[.., C, V]`` (without W: v itself, ``[T, H, V]`` strided), ``scores``
    ``[.., C, C]``, ``decay`` ``[chunks, H, K]``; ``pool`` ``[slots, H, ., .]`` by strides, read and written where
    ``slots[n] >= 0``; ``o`` ``[T, H, V]``. ``chunk_states`` ``[chunks, H, V, K]`` receives S at each chunk's start,
    ``track_state`` (row n, or ``track_slots[n]``) S at the start of chunk ``track_index[n]``. ``segments``
    ``[runs, 2]``: (sequence, segment in it) or -1; a segment has ``segment_chunks`` chunks and starts from its row of
    ``starts`` ``[runs, H, K, V]``; the last of a sequence stores the state.
    """
    run = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    n = run
    lead = 0
    if SEGMENTED:
        n = tl.load(segments + 2 * run)
        if n < 0:
            return
        lead = tl.load(segments + 2 * run + 1) * segment_chunks
    begin = tl.load(cu_seqlens + n).to(tl.int32)
    length = tl.load(cu_seqlens + n + 1).to(tl.int32) - begin
    count = (length + C - 1) // C
    stop = count
    if SEGMENTED:
        stop = tl.minimum(count, lead + segment_chunks)
    slot = tl.load(slots + n).to(tl.int64)

    key = tl.arange(0, K)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    row = tl.arange(0, C)
    home = pool + slot * pool_s + head * pool_h + key[:, None] * pool_k + value[None, :] * pool_v
    if SEGMENTED:
        origin = starts + (run.to(tl.int64) * heads + head) * (K * V)
        state = tl.load(origin + key[:, None] * V + value[None, :])
    else:
        state = resume_state(home, warm, n, slot, K, BV, HAS_WARM)
    if TRACK:
        tracked = tl.load(track_index + n).to(tl.int32)
        target = n.to(tl.int64)
        if TRACK_SLOTS:
            target = tl.load(track_slots + n).to(tl.int64)
        spot = target * track_s + head * track_h + key[:, None] * track_k + value[None, :] * track_v

    tile = tl.load(first + n).to(tl.int64) * heads + head
    for i in tl.range(lead, stop, num_stages=STAGES):
        at = tile + i * heads
        wide = at * (C * K) + row[:, None] * K + key[None, :]
        token = i * C + row
        live = (token < length)[:, None]
        token = (begin + token).to(tl.int64)[:, None]
        if KEEP_STARTS:
            tl.store(chunk_states + at * (V * K) + value[None, :] * K + key[:, None], state)
        if TRACK:  # noqa: SIM102
            if i == tracked:
                tl.store(track_state + spot, narrow(state, track_state.dtype.element_ty, DOT))
        rounded = operand(state, DOT)
        if HAS_W:
            fresh = tl.load(u + at * (C * V) + row[:, None] * V + value[None, :]).to(tl.float32)
            fresh -= tl.dot(operand(tl.load(w + wide), DOT), rounded, input_precision=PREC)
        else:
            fresh = tl.load(u + token * u_t + head * u_h + value[None, :], mask=live, other=0.0).to(tl.float32)
        fresh = operand(fresh, DOT)
        pairs = operand(tl.load(scores + at * (C * C) + row[:, None] * C + tl.arange(0, C)[None, :]), DOT)
        out = tl.dot(operand(tl.load(qg + wide), DOT), rounded, input_precision=PREC)
        out = tl.dot(pairs, fresh, acc=out, input_precision=PREC)
        tl.store(o + token * o_t + head * o_h + value[None, :], narrow(out, o.dtype.element_ty, DOT), mask=live)
        state *= tl.load(decay + at * K + key)[:, None]
        keys = operand(tl.load(kg + wide), DOT)
        state = tl.dot(tl.trans(keys), fresh, acc=state, input_precision=PREC)

    if STORE_STATE:  # noqa: SIM102
        if (slot >= 0) & (stop > lead) & (stop == count):
            tl.store(home, narrow(state, pool.dtype.element_ty, DOT))
