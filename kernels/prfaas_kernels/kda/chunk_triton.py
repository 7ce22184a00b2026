"""KDA chunkwise in Triton: prep, triangular solve, scan with the output fused. Four launches and a chunk table."""

from __future__ import annotations

import functools

import torch

from prfaas_kernels.common.chunk_table import CHUNK, build_chunk_table, real_chunks
from prfaas_kernels.common.delta_chunks import StateIo, Workspace, make_workspace, run_scan, run_solve
from prfaas_kernels.common.precision import precision_of
from prfaas_kernels.common.tuning import Settings, settings_for
from prfaas_kernels.kda.prep import GATE_LOG_DECAY, GATE_SIGMOID, GATE_SOFTPLUS, kda_prep_kernel


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    state_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    a_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    beta_is_raw: bool = False,
    qk_l2norm: bool = True,
    scale: float | None = None,
    return_chunk_states: bool = False,
    track_state: torch.Tensor | None = None,
    track_chunk_idx: torch.Tensor | None = None,
    settings: Settings | None = None,
    workspace: Workspace | None = None,
    segment_chunks: int | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`prfaas_kernels.kda.chunk_kda`, on the GPU or in Triton's interpreter.

    Launches only, no wait for the device (except with ``return_chunk_states``, whose shape depends on the lengths).
    ``settings`` overrides the tuning table; ``workspace`` gives buffers of the size ``make_workspace`` makes.
    ``segment_chunks``, ``max_seqlen``: see :func:`prfaas_kernels.common.delta_chunks.run_scan`.
    """
    tokens, heads, width, value_width = q.shape[1], v.shape[2], k.shape[3], v.shape[3]
    scale = width**-0.5 if scale is None else scale
    q, k, v = q[0], k[0], v[0]
    g = g.reshape(1, tokens, heads, width)[0]
    beta = beta.reshape(1, tokens, heads)[0]
    precision = precision_of(v.dtype)
    settings = settings_for(v.device) if settings is None else settings
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    table = build_chunk_table(cu_seqlens, tokens)
    work = make_workspace(table, heads, width, value_width, precision) if workspace is None else workspace
    gate = GATE_LOG_DECAY if a_log is None else GATE_SOFTPLUS if lower_bound is None else GATE_SIGMOID
    if table.bound > 0:
        strong = torch.empty(table.bound, heads, dtype=torch.int32, device=v.device)
        launch = functools.partial(
            kda_prep_kernel[(table.bound, heads)],
            q,
            k,
            g,
            beta,
            a_log,
            dt_bias,
            table.chunks,
            cu_seqlens,
            work.qg,
            work.kg,
            work.w,
            work.scores,
            work.lower,
            work.decay,
            strong,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            g.stride(0),
            g.stride(1),
            beta.stride(0),
            beta.stride(1),
            heads,
            scale,
            0.0 if lower_bound is None else lower_bound,
            GROUP=heads // q.shape[1],
            K=width,
            C=CHUNK,
            BK=min(settings.prep_block, width),
            GATE=gate,
            HAS_BIAS=dt_bias is not None and gate != GATE_LOG_DECAY,
            RAW_BETA=beta_is_raw,
            L2NORM=qk_l2norm,
            SPAN=precision.span,
            DOT=precision.dot,
            PREC=precision.prec,
            num_warps=settings.prep_warps,
            num_stages=settings.prep_stages,
        )
        launch(STRONG=False, maxnreg=settings.prep_max_registers)
        launch(STRONG=True)
    run_solve(work, v, beta, table, precision, settings, raw_beta=beta_is_raw)
    starts = None
    if return_chunk_states:
        starts = torch.empty(real_chunks(cu_seqlens), heads, value_width, width, device=v.device)
    state = StateIo(
        pool=state_pool,
        slots=cache_indices,
        chunk_states=starts,
        track_state=None if track_chunk_idx is None else track_state,
        track_index=track_chunk_idx,
    )
    run_scan(
        work,
        v,
        out,
        state,
        table,
        precision,
        settings,
        operator="kda",
        segment_chunks=segment_chunks,
        longest=max_seqlen,
    )
    return out.unsqueeze(0), None if starts is None or not starts.shape[0] else starts.unsqueeze(0)
