"""Lightning prefill: Triton's kernels where they can run, else torch."""

from __future__ import annotations

import torch

from prfaas_kernels.common.dispatch import Backend, choose
from prfaas_kernels.lightning import chunk_torch
from prfaas_kernels.lightning.inputs import LightningInputs


def chunk_lightning(inputs: LightningInputs, *, backend: Backend = "auto") -> torch.Tensor:
    """``[T, H, D]`` in the dtype of q; the state pool is updated in place.

    ``backend`` as in :func:`prfaas_kernels.kda.chunk_kda`.
    """
    if choose("lightning", inputs.q, inputs.k, inputs.v, backend).backend == "torch":
        return chunk_torch.chunk_lightning(inputs)
    from prfaas_kernels.lightning import chunk_triton

    return chunk_triton.chunk_lightning(inputs)
