"""GDN chunkwise in Triton: scalar-gate prep, then the solve and the scan of KDA."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_table import build_chunk_table, real_chunks
from prfaas_kernels.common.delta_chunks import (
    StateIo,
    Workspace,
    make_workspace,
    run_scalar_prep,
    run_scan,
    run_solve,
)
from prfaas_kernels.common.precision import precision_of
from prfaas_kernels.common.tuning import Settings, settings_for


def chunk_gdn(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    *,
    state_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    qk_l2norm: bool = True,
    scale: float | None = None,
    store_state: bool = True,
    track_state: torch.Tensor | None = None,
    track_chunk_idx: torch.Tensor | None = None,
    return_chunk_states: bool = False,
    settings: Settings | None = None,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`prfaas_kernels.gdn.chunk_gdn`, on the GPU or in Triton's interpreter.

    ``settings`` overrides the tuning table; ``workspace`` gives buffers of the size ``make_workspace`` makes.
    """
    tokens, heads, width, value_width = q.shape[1], v.shape[2], k.shape[3], v.shape[3]
    scale = width**-0.5 if scale is None else scale
    precision = precision_of(v.dtype)
    settings = settings_for(v.device) if settings is None else settings
    out = torch.zeros(v.shape[1:], dtype=v.dtype, device=v.device)
    table = build_chunk_table(cu_seqlens, tokens)
    work = make_workspace(table, heads, width, value_width, precision) if workspace is None else workspace
    run_scalar_prep(
        work,
        q[0],
        k[0],
        log_decay[0],
        beta[0],
        table,
        precision,
        settings,
        heads=heads,
        scale=scale,
        l2norm=qk_l2norm,
    )
    run_solve(work, v[0], beta[0], table, precision, settings, raw_beta=False)
    starts = None
    if return_chunk_states:
        starts = torch.empty(real_chunks(cu_seqlens), heads, value_width, width, device=v.device)
    state = StateIo(
        pool=state_pool,
        slots=cache_indices,
        store=store_state,
        chunk_states=starts,
        track_state=None if track_chunk_idx is None else track_state,
        track_index=track_chunk_idx,
    )
    run_scan(work, v[0], out, state, table, precision, settings)
    return out.unsqueeze(0), None if starts is None or not starts.shape[0] else starts.unsqueeze(0)
