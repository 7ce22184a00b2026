"""KDA chunkwise in Triton: prep, triangular solve, scan with the output fused. Four launches and a chunk table."""

from __future__ import annotations

import functools

import torch

from prfaas_kernels.common.chunk_launches import run_solve
from prfaas_kernels.common.chunk_run import ChunkRun, start_run
from prfaas_kernels.common.scan import scan_delta
from prfaas_kernels.common.tuning import Settings
from prfaas_kernels.kda.inputs import KdaInputs
from prfaas_kernels.kda.prep import GATE_LOG_DECAY, GATE_SIGMOID, GATE_SOFTPLUS, kda_prep_kernel


def _run_prep(run: ChunkRun, inputs: KdaInputs, g: torch.Tensor, beta: torch.Tensor) -> None:
    """Fill all of the workspace but ``u``; ``g`` ``[T, HV, K]``, ``beta`` ``[T, HV]``."""
    table = run.table
    if table.bound == 0:
        return
    q, k, lower_bound = inputs.q[0], inputs.k[0], inputs.lower_bound
    gate = GATE_LOG_DECAY if inputs.a_log is None else GATE_SOFTPLUS if lower_bound is None else GATE_SIGMOID
    launch = functools.partial(
        kda_prep_kernel[(table.bound, run.heads)],
        q,
        k,
        g,
        beta,
        inputs.a_log,
        inputs.dt_bias,
        table.chunks,
        table.cu_seqlens,
        *run.work.prepared,
        torch.empty(table.bound, run.heads, dtype=torch.int32, device=q.device),
        *q.stride()[:2],
        *k.stride()[:2],
        *g.stride()[:2],
        *beta.stride(),
        run.heads,
        inputs.score_scale,
        0.0 if lower_bound is None else lower_bound,
        GATE=gate,
        HAS_BIAS=inputs.dt_bias is not None and gate != GATE_LOG_DECAY,
        RAW_BETA=inputs.beta_is_raw,
        L2NORM=inputs.qk_l2norm,
        SPAN=run.precision.span,
        **run.prep_options(q),
    )
    launch(STRONG=False, maxnreg=run.settings.prep_max_registers)
    launch(STRONG=True)


def chunk_kda(
    inputs: KdaInputs, *, settings: Settings | None = None, segment_chunks: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`prfaas_kernels.kda.chunk_kda`, on the GPU or in Triton's interpreter.

    Launches only, no wait for the device (except for the states of all chunks, whose number depends on the lengths).
    ``settings`` overrides the tuning table; ``segment_chunks``: see :func:`prfaas_kernels.common.scan.run_scan`.
    """
    run = start_run(inputs.v[0], inputs.width, inputs.cu_seqlens, settings=settings)
    g = inputs.g.reshape(inputs.tokens, inputs.heads, inputs.width)
    beta = inputs.beta.reshape(inputs.tokens, inputs.heads)
    _run_prep(run, inputs, g, beta)
    run_solve(run, inputs.v[0], beta, raw_beta=inputs.beta_is_raw)
    return scan_delta(run, inputs, operator="kda", segment_chunks=segment_chunks)
