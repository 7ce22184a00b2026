"""KDA prefill: Triton's kernels where they can run, else torch."""

from __future__ import annotations

import torch

from prfaas_kernels.common.dispatch import Backend, choose
from prfaas_kernels.kda import chunk_torch
from prfaas_kernels.kda.inputs import KdaInputs


def chunk_kda(inputs: KdaInputs, *, backend: Backend = "auto") -> tuple[torch.Tensor, torch.Tensor | None]:
    """``o`` ``[1, T, HV, V]`` in the dtype of v and, if asked, the states at the start of every 64-token chunk
    ``[1, chunks, HV, V, K]`` float32. The state pool is updated in place.

    ``backend`` "triton" raises ValueError where the kernels can't run; "auto" falls back to torch and logs why.
    """
    if choose("kda", inputs.q, inputs.k, inputs.v, backend).backend == "torch":
        return chunk_torch.chunk_kda(inputs)
    from prfaas_kernels.kda import chunk_triton

    return chunk_triton.chunk_kda(inputs)
