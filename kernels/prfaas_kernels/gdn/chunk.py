"""GDN prefill: Triton's kernels where they can run, else torch."""

from __future__ import annotations

import torch

from prfaas_kernels.common.dispatch import Backend, choose
from prfaas_kernels.gdn import chunk_torch


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
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The contract of SGLang's GDN ``extend``: see :func:`prfaas_kernels.gdn.chunk_torch.chunk_gdn`.

    ``backend`` as in :func:`prfaas_kernels.kda.chunk_kda`.
    """
    if choose("gdn", q, k, v, backend).backend == "triton":
        from prfaas_kernels.gdn.chunk_triton import chunk_gdn as run
    else:
        run = chunk_torch.chunk_gdn
    return run(
        q,
        k,
        v,
        log_decay,
        beta,
        state_pool=state_pool,
        cache_indices=cache_indices,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        scale=scale,
        store_state=store_state,
        track_state=track_state,
        track_chunk_idx=track_chunk_idx,
        return_chunk_states=return_chunk_states,
    )
