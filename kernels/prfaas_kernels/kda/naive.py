"""KDA token by token in float64: the truth that every other implementation is compared with.

Kimi Linear (arXiv 2510.26692), eq. 1: per token and head, with S ``[V, K]``::

    S <- S * exp(g)
    S <- S + beta * (v - S k) k^T
    o  = scale * S q
"""

from __future__ import annotations

import torch

from prfaas_kernels.common.maths import l2_normalise, sequence_bounds, softplus


def kda_gate(
    g: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor | None, lower_bound: float | None
) -> torch.Tensor:
    """Log decay (<= 0) from the raw gate, in the dtype of ``g`` (float32 or float64).

    ``g`` ``[..., HV, K]``; ``a_log`` and ``dt_bias`` with HV and HV * K values, of any shape. Without a lower bound
    ``-exp(a_log) * softplus(g + dt_bias)``, else ``lower_bound * sigmoid(exp(a_log) * (g + dt_bias))``.
    """
    heads, width = g.shape[-2:]
    rate = a_log.reshape(heads, 1).to(g.dtype).exp()
    if dt_bias is not None:
        g = g + dt_bias.reshape(heads, width).to(g.dtype)
    if lower_bound is None:
        return -rate * softplus(g)
    return lower_bound * torch.sigmoid(rate * g)


def recurrent_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    qk_l2norm: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``q``, ``k`` ``[T, H, K]``, ``v`` ``[T, HV, V]``, ``log_decay`` ``[T, HV, K]``, ``beta`` ``[T, HV]`` in (0, 1).

    ``initial_state`` ``[N, HV, V, K]`` (None: zeros), ``scale`` None means ``K ** -0.5``. HV is a multiple of H.
    Returns ``o`` ``[T, HV, V]`` and the final states ``[N, HV, V, K]``, both float64.
    """
    q, k, v, log_decay, beta = (x.double() for x in (q, k, v, log_decay, beta))
    if qk_l2norm:
        q, k = l2_normalise(q), l2_normalise(k)
    groups = v.shape[1] // q.shape[1]
    q, k = (x.repeat_interleave(groups, dim=1) for x in (q, k))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    bounds = sequence_bounds(q.shape[0], cu_seqlens)
    states = v.new_zeros(len(bounds), v.shape[1], v.shape[2], k.shape[2])
    if initial_state is not None:
        states = initial_state.double().clone()
    out = torch.zeros_like(v)
    for n, (begin, end) in enumerate(bounds):
        state = states[n]
        for t in range(begin, end):
            state = state * log_decay[t].exp().unsqueeze(1)
            error = v[t] - torch.einsum("hvk,hk->hv", state, k[t])
            state = state + torch.einsum("h,hv,hk->hvk", beta[t], error, k[t])
            out[t] = scale * torch.einsum("hvk,hk->hv", state, q[t])
        states[n] = state
    return out, states
