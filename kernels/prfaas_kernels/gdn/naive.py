"""GDN token by token in float64: KDA's recurrence with one gate for all key channels of a head.

Gated Delta Networks (arXiv 2412.06464), eq. 10.
"""

from __future__ import annotations

import torch

from prfaas_kernels.common.maths import softplus
from prfaas_kernels.kda.naive import recurrent_kda


def gdn_gate(a: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Log decay ``-exp(a_log) * softplus(a + dt_bias)``; ``a`` ``[..., HV]``, float32 or float64, others ``[HV]``."""
    return -a_log.to(a.dtype).exp() * softplus(a + dt_bias.to(a.dtype))


def recurrent_gdn(
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
    """As :func:`prfaas_kernels.kda.naive.recurrent_kda` with ``log_decay`` ``[T, HV]``."""
    per_channel = log_decay.unsqueeze(-1).expand(*log_decay.shape, k.shape[-1])
    return recurrent_kda(
        q,
        k,
        v,
        per_channel,
        beta,
        scale=scale,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
    )
