"""GDN prefill: Triton's kernels where they can run, else torch."""

from __future__ import annotations

import torch

from prfaas_kernels.common.dispatch import Backend, choose
from prfaas_kernels.gdn import chunk_torch
from prfaas_kernels.gdn.inputs import GdnInputs


def chunk_gdn(inputs: GdnInputs, *, backend: Backend = "auto") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Results and ``backend`` as of :func:`prfaas_kernels.kda.chunk_kda`."""
    if choose("gdn", inputs.q, inputs.k, inputs.v, backend).backend == "torch":
        return chunk_torch.chunk_gdn(inputs)
    from prfaas_kernels.gdn import chunk_triton

    return chunk_triton.chunk_gdn(inputs)
