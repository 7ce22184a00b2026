"""Lightning attention token by token in float64 (arXiv 2405.17381, eq. 4); S is ``[K, V]`` here, not ``[V, K]``."""

from __future__ import annotations

import torch

from prfaas_kernels.common.maths import sequence_bounds


def recurrent_lightning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``S <- exp(-slope) S + k v^T``, ``o = scale * S^T q``.

    ``q``, ``k`` ``[T, H, K]``, ``v`` ``[T, H, V]``, ``slopes`` H values >= 0, ``initial_state`` ``[N, H, K, V]``.
    Returns ``o`` ``[T, H, V]`` and the final states ``[N, H, K, V]``, both float64.
    """
    q, k, v = (x.double() for x in (q, k, v))
    decay = (-slopes.double().reshape(-1)).exp().view(-1, 1, 1)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    bounds = sequence_bounds(q.shape[0], cu_seqlens)
    states = v.new_zeros(len(bounds), k.shape[1], k.shape[2], v.shape[2])
    if initial_state is not None:
        states = initial_state.double().clone()
    out = torch.zeros_like(v)
    for n, (begin, end) in enumerate(bounds):
        state = states[n]
        for t in range(begin, end):
            state = state * decay + torch.einsum("hk,hv->hkv", k[t], v[t])
            out[t] = scale * torch.einsum("hkv,hk->hv", state, q[t])
        states[n] = state
    return out, states
