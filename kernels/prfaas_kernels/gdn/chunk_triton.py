"""GDN chunkwise in Triton: scalar-gate prep, then the solve and the scan of KDA."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_launches import run_scalar_prep, run_solve
from prfaas_kernels.common.chunk_run import start_run
from prfaas_kernels.common.scan import scan_delta
from prfaas_kernels.common.tuning import Settings
from prfaas_kernels.gdn.inputs import GdnInputs


def chunk_gdn(
    inputs: GdnInputs, *, settings: Settings | None = None, segment_chunks: int | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`prfaas_kernels.gdn.chunk_gdn`, on the GPU or in Triton's interpreter.

    ``settings`` and ``segment_chunks`` as in :func:`prfaas_kernels.kda.chunk_triton.chunk_kda`.
    """
    q, k, v, beta = inputs.q[0], inputs.k[0], inputs.v[0], inputs.beta[0]
    run = start_run(v, inputs.width, inputs.cu_seqlens, settings=settings)
    run_scalar_prep(run, q, k, inputs.log_decay[0], beta, scale=inputs.score_scale, l2norm=inputs.qk_l2norm)
    run_solve(run, v, beta, raw_beta=False)
    return scan_delta(run, inputs, operator="gdn", store=inputs.store_state, segment_chunks=segment_chunks)
