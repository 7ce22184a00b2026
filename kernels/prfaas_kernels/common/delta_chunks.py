"""Launch of the parts that the operators share: workspace, scalar prep, triangular solve, scan."""

from __future__ import annotations

from typing import NamedTuple

import torch

from prfaas_kernels.common.chunk_table import CHUNK, ChunkTable
from prfaas_kernels.common.delta_solve import delta_solve_kernel
from prfaas_kernels.common.precision import Precision
from prfaas_kernels.common.scalar_prep import scalar_prep_kernel
from prfaas_kernels.common.segments import find_starts, log_plan, multiprocessors, plan_segments
from prfaas_kernels.common.state_scan import state_scan_kernel
from prfaas_kernels.common.tuning import Settings


class Workspace(NamedTuple):
    """Tiles per (chunk, head): ``qg``, ``kg``, ``w`` ``[chunks, H, C, K]``, ``u`` ``[.., C, V]``, ``scores``
    ``[.., C, C]``, ``lower`` ``[.., C, C]`` float32, ``decay`` ``[chunks, H, K]`` float32. Uninitialised: the kernels
    write every element of the tiles in use before they read it.
    """

    qg: torch.Tensor
    kg: torch.Tensor
    w: torch.Tensor | None
    u: torch.Tensor | None
    scores: torch.Tensor
    lower: torch.Tensor | None
    decay: torch.Tensor


class StateIo(NamedTuple):
    """``pool`` ``[slots, H, V, K]`` by ``slots`` ``[N]``; ``warm`` ``[N]`` or None.

    ``key_dim`` and ``value_dim``: which dimension of ``pool`` and ``track_state`` is which. Where ``track_index[n]``
    names a chunk, the state at its start goes to row ``n`` of ``track_state``, or to row ``track_slots[n]``.
    """

    pool: torch.Tensor
    slots: torch.Tensor
    warm: torch.Tensor | None = None
    key_dim: int = 3
    value_dim: int = 2
    store: bool = True
    chunk_states: torch.Tensor | None = None
    track_state: torch.Tensor | None = None
    track_index: torch.Tensor | None = None
    track_slots: torch.Tensor | None = None


def make_workspace(
    table: ChunkTable, heads: int, width: int, value_width: int, precision: Precision, *, delta_rule: bool = True
) -> Workspace:
    """Buffers for ``table.bound`` chunks of ``heads`` heads with K = ``width`` and V = ``value_width``."""
    device = table.chunks.device

    def tiles(*shape: int, dtype: torch.dtype = precision.store) -> torch.Tensor:
        return torch.empty(table.bound, heads, *shape, dtype=dtype, device=device)

    return Workspace(
        qg=tiles(CHUNK, width),
        kg=tiles(CHUNK, width),
        w=tiles(CHUNK, width) if delta_rule else None,
        u=tiles(CHUNK, value_width) if delta_rule else None,
        scores=tiles(CHUNK, CHUNK),
        lower=tiles(CHUNK, CHUNK, dtype=torch.float32) if delta_rule else None,
        decay=tiles(width, dtype=torch.float32),
    )


def run_scalar_prep(
    work: Workspace,
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor | None,
    table: ChunkTable,
    precision: Precision,
    settings: Settings,
    *,
    heads: int,
    scale: float,
    l2norm: bool,
) -> None:
    """``q``, ``k`` ``[T, Hk, K]``, ``beta`` ``[T, HV]`` or None (no delta rule), ``g`` ``[T, HV]`` log decay or
    ``[HV]`` slopes: fills all of ``work`` but ``u``.
    """
    if table.bound == 0:
        return
    fixed = g.dim() == 1
    scalar_prep_kernel[(table.bound, heads)](
        q,
        k,
        g,
        beta,
        table.chunks,
        table.cu_seqlens,
        work.qg,
        work.kg,
        work.w,
        work.scores,
        work.lower,
        work.decay,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        0 if fixed else g.stride(0),
        0 if fixed else g.stride(1),
        0 if beta is None else beta.stride(0),
        0 if beta is None else beta.stride(1),
        heads,
        scale,
        GROUP=heads // q.shape[1],
        K=q.shape[2],
        C=CHUNK,
        BK=min(settings.prep_block, q.shape[2]),
        DELTA=beta is not None,
        FIXED=fixed,
        L2NORM=l2norm,
        DOT=precision.dot,
        PREC=precision.prec,
        num_warps=settings.prep_warps,
        num_stages=settings.prep_stages,
    )


def run_solve(
    work: Workspace,
    v: torch.Tensor,
    beta: torch.Tensor,
    table: ChunkTable,
    precision: Precision,
    settings: Settings,
    *,
    raw_beta: bool,
) -> None:
    """``v`` ``[T, HV, V]``, ``beta`` ``[T, HV]``: fills ``work.w`` (from ``k 2^G``) and ``work.u``."""
    heads, value_width, width = v.shape[1], v.shape[2], work.qg.shape[3]
    if table.bound == 0:
        return
    delta_solve_kernel[(table.bound, heads)](
        work.lower,
        work.w,
        work.u,
        v,
        beta,
        table.chunks,
        table.cu_seqlens,
        v.stride(0),
        v.stride(1),
        beta.stride(0),
        beta.stride(1),
        heads,
        K=width,
        V=value_width,
        C=CHUNK,
        BLOCK=min(settings.solve_block, width, value_width),
        RAW_BETA=raw_beta,
        DOT=precision.dot,
        PREC=precision.prec,
        MERGE_PREC=precision.merge_prec,
        num_warps=settings.solve_warps,
    )


def run_scan(
    work: Workspace,
    v: torch.Tensor,
    out: torch.Tensor,
    state: StateIo,
    table: ChunkTable,
    precision: Precision,
    settings: Settings,
    *,
    operator: str,
    segment_chunks: int | None = None,
    longest: int | None = None,
) -> None:
    """Carry the state through each sequence's chunks; ``v`` and ``out`` ``[T, H, V]``.

    ``segment_chunks``: chunks in a segment, 0 for a serial scan; None: by
    :func:`prfaas_kernels.common.segments.plan_segments`, which ``longest`` (tokens of the longest sequence) helps.
    """
    heads, value_width, width = v.shape[1], v.shape[2], work.qg.shape[3]
    sequences = table.cu_seqlens.shape[0] - 1
    block = min(settings.scan_block, value_width)
    if sequences * heads == 0:
        return
    pool, track = state.pool, state.track_state
    pool_strides = (*pool.stride()[:2], pool.stride(state.key_dim), pool.stride(state.value_dim))
    values = v if work.u is None else work.u
    if segment_chunks is None:
        plan = plan_segments(
            tokens=v.shape[0],
            sequences=sequences,
            heads=heads,
            blocks=value_width // block,
            slots=multiprocessors(v.device) * settings.segment_programs,
            settings=settings,
            longest=longest,
        )
        log_plan(operator, heads, plan)
        segment_chunks = plan.chunks
    segments = None
    if segment_chunks:
        segments = find_starts(
            kg=work.kg,
            w=work.w,
            u=values,
            decay=work.decay,
            pool=pool,
            pool_strides=pool_strides,
            slots=state.slots,
            warm=state.warm,
            table=table,
            total_tokens=v.shape[0],
            segment_chunks=segment_chunks,
            value_width=value_width,
            precision=precision,
            settings=settings,
        )
    runs = sequences if segments is None else segments.table.bound
    track_strides = (0, 0, 0, 0)
    if track is not None:
        track_strides = (*track.stride()[:2], track.stride(state.key_dim), track.stride(state.value_dim))
    state_scan_kernel[(value_width // block, runs * heads)](
        work.qg,
        work.kg,
        work.w,
        values,
        work.scores,
        work.decay,
        out,
        pool,
        state.slots,
        state.warm,
        table.cu_seqlens,
        table.first,
        state.chunk_states,
        track,
        state.track_index,
        state.track_slots,
        None if segments is None else segments.table.chunks,
        None if segments is None else segments.starts,
        segment_chunks,
        v.stride(0),
        v.stride(1),
        out.stride(0),
        out.stride(1),
        *pool_strides,
        *track_strides,
        heads,
        K=width,
        V=value_width,
        C=CHUNK,
        BV=block,
        HAS_W=work.w is not None,
        HAS_WARM=state.warm is not None,
        STORE_STATE=state.store,
        KEEP_STARTS=state.chunk_states is not None,
        TRACK=track is not None,
        TRACK_SLOTS=state.track_slots is not None,
        SEGMENTED=segments is not None,
        DOT=precision.dot,
        PREC=precision.prec,
        STAGES=settings.scan_stages,
        num_warps=settings.scan_warps,
        num_stages=settings.scan_stages,
    )
