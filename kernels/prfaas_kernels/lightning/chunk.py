"""Lightning prefill: Triton's kernels where they can run, else torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from prfaas_kernels.common.dispatch import Backend, choose
from prfaas_kernels.lightning import chunk_torch


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
    max_seqlen: int | None = None,
    backend: Backend = "auto",
) -> torch.Tensor:
    """The contract of SGLang's ``seg_la_fwd``: see :func:`prfaas_kernels.lightning.chunk_torch.chunk_lightning`.

    ``max_seqlen`` and ``backend`` as in :func:`prfaas_kernels.kda.chunk_kda`.
    """
    run: Callable[..., Any] = chunk_torch.chunk_lightning
    if choose("lightning", q, k, v, backend).backend == "triton":
        from prfaas_kernels.lightning.chunk_triton import chunk_lightning as on_triton

        run = functools.partial(on_triton, max_seqlen=max_seqlen)
    return run(
        q,
        k,
        v,
        slopes,
        state_pool=state_pool,
        cache_indices=cache_indices,
        cu_seqlens=cu_seqlens,
        has_initial_state=has_initial_state,
        scale=scale,
        track_lens=track_lens,
        track_slots=track_slots,
    )
