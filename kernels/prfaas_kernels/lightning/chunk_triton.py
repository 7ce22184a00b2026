"""Lightning attention chunkwise in Triton: scalar-gate prep with a fixed decay, scan without a delta rule."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_launches import run_scalar_prep
from prfaas_kernels.common.chunk_run import StateIo, start_run
from prfaas_kernels.common.chunk_table import CHUNK
from prfaas_kernels.common.scan import run_scan
from prfaas_kernels.common.tuning import Settings
from prfaas_kernels.lightning.inputs import LightningInputs


def _state_of(inputs: LightningInputs) -> StateIo:
    """Where states are read and stored; ``track_lens`` as chunks."""
    track_index = None
    if inputs.track_lens is not None and inputs.track_slots is not None:
        on_grid = (inputs.track_slots >= 0) & (inputs.track_lens % CHUNK == 0)
        track_index = torch.where(on_grid, inputs.track_lens // CHUNK, -1).to(torch.int32)
    return StateIo(
        pool=inputs.state_pool,
        slots=inputs.cache_indices,
        warm=inputs.has_initial_state,
        key_dim=2,
        value_dim=3,
        track_state=None if track_index is None else inputs.state_pool,
        track_index=track_index,
        track_slots=inputs.track_slots,
    )


def chunk_lightning(
    inputs: LightningInputs, *, settings: Settings | None = None, segment_chunks: int | None = None
) -> torch.Tensor:
    """As :func:`prfaas_kernels.lightning.chunk_lightning`, on the GPU or in Triton's interpreter.

    Does not wait for the device, so a ``track_lens`` that is no multiple of 64 below the sequence's length stores
    nothing instead of being refused. ``settings`` and ``segment_chunks`` as in
    :func:`prfaas_kernels.kda.chunk_triton.chunk_kda`.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    run = start_run(v, k.shape[2], inputs.cu_seqlens, delta_rule=False, settings=settings)
    slopes = inputs.slopes.reshape(-1).to(device=q.device, dtype=torch.float32)
    run_scalar_prep(run, q, k, slopes, None, scale=inputs.score_scale, l2norm=False)
    out = torch.zeros(v.shape, dtype=q.dtype, device=q.device)
    run_scan(
        run,
        v,
        out,
        _state_of(inputs),
        operator="lightning",
        segment_chunks=segment_chunks,
        longest=inputs.max_seqlen,
    )
    return out
