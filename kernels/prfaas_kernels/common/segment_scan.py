"""Start states of the segments of long sequences, so that few heads still fill a GPU.

Over a segment the state is an affine function of its start: ``S_end = M S_start + b``. Per chunk::

    S <- (diag(decay) - Kg^T W) S + Kg^T U

so b is the state reached from zeros, and M the one reached from the identity with U = 0: the columns of ``[b | M]`` are
carried by the same recurrence, all segments at once (``segment_pass_kernel``). ``segment_merge_kernel`` then carries
the true state over the segments of each sequence, and the scan runs again from the starts, with output. Without a
delta rule M is a vector, the product of the decays. The last segment of a sequence needs neither.
"""

from __future__ import annotations

import triton
import triton.language as tl

from prfaas_kernels.common.chunk_rows import resume_state
from prfaas_kernels.common.operand import operand


@triton.jit
def segment_pass_kernel(
    kg,
    w,
    u,
    decay,
    maps,
    starts,
    cu_seqlens,
    first,
    segments,
    segment_chunks,
    u_t,
    u_h,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    HAS_W: tl.constexpr,
    DOT: tl.constexpr,
    PREC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid ((V + K) // BV, segments * H), without W (V // BV, ...). Tiles as in ``state_scan_kernel``.

    Writes b to ``starts`` ``[segments, H, K, V]`` and M to ``maps`` ``[segments, H, K, K]`` (without W ``[.., K]``),
    both float32, for all but the last segment of each sequence.
    """
    run = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    n = tl.load(segments + 2 * run)
    if n < 0:
        return
    length = tl.load(cu_seqlens + n + 1).to(tl.int32) - tl.load(cu_seqlens + n).to(tl.int32)
    lead = tl.load(segments + 2 * run + 1) * segment_chunks
    stop = lead + segment_chunks
    if stop >= (length + C - 1) // C:
        return
    begin = tl.load(cu_seqlens + n).to(tl.int32)

    key = tl.arange(0, K)
    row = tl.arange(0, C)
    column = tl.program_id(0) * BV
    value = column + tl.arange(0, BV)
    state = tl.zeros([K, BV], tl.float32)
    if HAS_W:
        state += tl.where(key[:, None] == value[None, :] - V, 1.0, 0.0)
    gain = tl.full([K], 1.0, tl.float32)
    driven = (value < V)[None, :] & (row >= 0)[:, None]
    tile = tl.load(first + n).to(tl.int64) * heads + head
    for i in tl.range(lead, stop, num_stages=STAGES):
        at = tile + i * heads
        wide = at * (C * K) + row[:, None] * K + key[None, :]
        if HAS_W:
            inner = u + at * (C * V) + row[:, None] * V + value[None, :]
            fresh = tl.load(inner, mask=driven, other=0.0).to(tl.float32)
            fresh -= tl.dot(operand(tl.load(w + wide), DOT), operand(state, DOT), input_precision=PREC)
        else:
            token = (begin + i * C + row).to(tl.int64)[:, None]
            fresh = tl.load(u + token * u_t + head * u_h + value[None, :]).to(tl.float32)
        kept = tl.load(decay + at * K + key)
        gain *= kept
        state *= kept[:, None]
        keys = operand(tl.load(kg + wide), DOT)
        state = tl.dot(tl.trans(keys), operand(fresh, DOT), acc=state, input_precision=PREC)

    origin = run.to(tl.int64) * heads + head
    if HAS_W:
        if column < V:
            tl.store(starts + origin * (K * V) + key[:, None] * V + value[None, :], state)
        else:
            tl.store(maps + origin * (K * K) + key[:, None] * K + (value - V)[None, :], state)
    else:
        tl.store(starts + origin * (K * V) + key[:, None] * V + value[None, :], state)
        if column == 0:
            tl.store(maps + origin * K + key, gain)


@triton.jit
def segment_merge_kernel(
    maps,
    starts,
    pool,
    slots,
    warm,
    cu_seqlens,
    first_segment,
    segment_chunks,
    pool_s,
    pool_h,
    pool_k,
    pool_v,
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    HAS_W: tl.constexpr,
    HAS_WARM: tl.constexpr,
    MERGE_PREC: tl.constexpr,
):
    """Grid (V // BV, N * H). Replaces b in ``starts`` by the state at each segment's start; the pool is only read.

    ``first_segment`` ``[N]``: row of each sequence's first segment.
    """
    n = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    length = tl.load(cu_seqlens + n + 1).to(tl.int32) - tl.load(cu_seqlens + n).to(tl.int32)
    if length <= 0:
        return
    chunks = (length + C - 1) // C
    last = (chunks + segment_chunks - 1) // segment_chunks - 1
    slot = tl.load(slots + n).to(tl.int64)

    key = tl.arange(0, K)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    home = pool + slot * pool_s + head * pool_h + key[:, None] * pool_k + value[None, :] * pool_v
    state = resume_state(home, warm, n, slot, K, BV, HAS_WARM)

    origin = tl.load(first_segment + n).to(tl.int64) * heads + head
    place = key[:, None] * V + value[None, :]
    for s in range(0, last):
        at = origin + s * heads
        spot = starts + at * (K * V) + place
        reached = tl.load(spot)
        tl.store(spot, state)
        if HAS_W:
            whole = tl.load(maps + at * (K * K) + key[:, None] * K + tl.arange(0, K)[None, :])
            state = reached + tl.dot(whole, state, input_precision=MERGE_PREC)
        else:
            state = reached + tl.load(maps + at * K + key)[:, None] * state
    tl.store(starts + (origin + last * heads) * (K * V) + place, state)
