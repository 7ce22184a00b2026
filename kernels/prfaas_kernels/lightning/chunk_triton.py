"""Lightning attention chunkwise in Triton: scalar-gate prep with a fixed decay, scan without a delta rule."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_table import CHUNK, build_chunk_table
from prfaas_kernels.common.delta_chunks import StateIo, Workspace, make_workspace, run_scalar_prep, run_scan
from prfaas_kernels.common.precision import precision_of
from prfaas_kernels.common.tuning import Settings, settings_for


def chunk_lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    state_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    has_initial_state: torch.Tensor | None = None,
    scale: float | None = None,
    track_lens: torch.Tensor | None = None,
    track_slots: torch.Tensor | None = None,
    settings: Settings | None = None,
    workspace: Workspace | None = None,
    segment_chunks: int | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """As :func:`prfaas_kernels.lightning.chunk_lightning`, on the GPU or in Triton's interpreter.

    Does not wait for the device, so a ``track_lens`` that is no multiple of 64 below the sequence's length stores
    nothing instead of being refused. ``settings`` overrides the tuning table; ``workspace`` as in
    :func:`prfaas_kernels.kda.chunk_triton.chunk_kda`.
    """
    tokens, heads, width = q.shape
    scale = width**-0.5 if scale is None else scale
    precision = precision_of(v.dtype)
    settings = settings_for(v.device) if settings is None else settings
    out = torch.zeros(v.shape, dtype=q.dtype, device=q.device)
    table = build_chunk_table(cu_seqlens, tokens)
    work = workspace
    if work is None:
        work = make_workspace(table, heads, width, v.shape[2], precision, delta_rule=False)
    slopes = slopes.reshape(-1).to(device=q.device, dtype=torch.float32)
    run_scalar_prep(work, q, k, slopes, None, table, precision, settings, heads=heads, scale=scale, l2norm=False)
    track_index = None
    if track_lens is not None and track_slots is not None:
        on_grid = (track_slots >= 0) & (track_lens % CHUNK == 0)
        track_index = torch.where(on_grid, track_lens // CHUNK, -1).to(torch.int32)
    state = StateIo(
        pool=state_pool,
        slots=cache_indices,
        warm=has_initial_state,
        key_dim=2,
        value_dim=3,
        track_state=None if track_index is None else state_pool,
        track_index=track_index,
        track_slots=track_slots,
    )
    run_scan(
        work,
        v,
        out,
        state,
        table,
        precision,
        settings,
        operator="lightning",
        segment_chunks=segment_chunks,
        longest=max_seqlen,
    )
    return out
