"""KDA prefill: Triton's kernels where they can run, else torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from prfaas_kernels.common.dispatch import Backend, choose
from prfaas_kernels.kda import chunk_torch


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
    max_seqlen: int | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The contract of SGLang's KDA ``extend``: see :func:`prfaas_kernels.kda.chunk_torch.chunk_kda`.

    ``backend`` "triton" raises ValueError where the kernels can't run; "auto" falls back to torch and logs why.
    ``max_seqlen``: tokens of the longest sequence, where the caller knows it without waiting for the device; it helps
    the choice between a serial scan and one in segments (:mod:`prfaas_kernels.common.segments`).
    """
    run: Callable[..., Any] = chunk_torch.chunk_kda
    if choose("kda", q, k, v, backend).backend == "triton":
        from prfaas_kernels.kda.chunk_triton import chunk_kda as on_triton

        run = functools.partial(on_triton, max_seqlen=max_seqlen)
    return run(
        q,
        k,
        v,
        g,
        beta,
        state_pool=state_pool,
        cache_indices=cache_indices,
        cu_seqlens=cu_seqlens,
        a_log=a_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        beta_is_raw=beta_is_raw,
        qk_l2norm=qk_l2norm,
        scale=scale,
        return_chunk_states=return_chunk_states,
        track_state=track_state,
        track_chunk_idx=track_chunk_idx,
    )
