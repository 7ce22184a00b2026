"""Inside kernels: a chunk's tokens, the normalisation of its queries and keys, a sequence's first state."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_rows(table, cu_seqlens, chunk, n, C: tl.constexpr):
    """Tokens ``[C]`` int64 of row ``chunk`` of ``table``, which is of sequence ``n``, and which of them are its own."""
    begin = tl.load(cu_seqlens + n).to(tl.int32) + tl.load(table + 2 * chunk + 1) * C
    end = tl.load(cu_seqlens + n + 1).to(tl.int32)
    token = begin + tl.arange(0, C)
    return token.to(tl.int64), token < end


@triton.jit
def row_scales(q_rows, k_rows, mask, scale, C: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, L2NORM: tl.constexpr):
    """Factors ``[C]`` float32 of the rows of q, ``scale`` among them, and of k; with L2NORM they normalise both.

    ``q_rows``, ``k_rows`` ``[C, BK]``: pointers to the first BK of K channels.
    """
    q_scale = tl.full([C], 1.0, tl.float32) * scale
    k_scale = tl.full([C], 1.0, tl.float32)
    if L2NORM:
        q_norm = tl.full([C], 1e-6, tl.float32)
        k_norm = tl.full([C], 1e-6, tl.float32)
        for at in range(0, K, BK):
            x = tl.load(q_rows + at, mask=mask, other=0.0).to(tl.float32)
            q_norm += tl.sum(x * x, axis=1)
            x = tl.load(k_rows + at, mask=mask, other=0.0).to(tl.float32)
            k_norm += tl.sum(x * x, axis=1)
        q_scale = scale * (1.0 / tl.sqrt(q_norm))
        k_scale = 1.0 / tl.sqrt(k_norm)
    return q_scale, k_scale


@triton.jit
def resume_state(home, warm, n, slot, K: tl.constexpr, BV: tl.constexpr, HAS_WARM: tl.constexpr):
    """State ``[K, BV]`` float32 of sequence ``n``: what ``home`` points to where ``slot`` holds one, else zeros."""
    state = tl.zeros([K, BV], tl.float32)
    resume = slot >= 0
    if HAS_WARM:
        resume = resume & (tl.load(warm + n).to(tl.int32) != 0)
    if resume:
        state = tl.load(home).to(tl.float32)
    return state
