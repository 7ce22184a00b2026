"""KDA chunkwise in vectorised torch, float32; any device, no Triton.

Exponents are formed as differences ``G_i - G_j`` with i >= j before ``exp``, so none is positive and strong gates
(hundreds of nats in a chunk) underflow to zero instead of overflowing.
"""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_scan import ChunkTerms, solve_delta
from prfaas_kernels.common.delta_torch import scan_sequences, spread_heads
from prfaas_kernels.common.maths import chunk_spans, pad_to_chunks
from prfaas_kernels.kda.inputs import KdaInputs
from prfaas_kernels.kda.naive import kda_gate

CHUNK = 32


def _terms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, scale: float
) -> ChunkTerms:
    """One sequence, heads already repeated: ``[T, HV, .]``, ``beta`` ``[T, HV]``."""
    q, k, v, g = (pad_to_chunks(x, CHUNK) for x in (q, k, v, log_decay))
    b = pad_to_chunks(beta.unsqueeze(-1), CHUNK)
    total = g.cumsum(2)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    heads, chunks, _, width = k.shape
    rows = torch.stack((k * b, q * scale), dim=3)
    pair = k.new_empty(heads, chunks, 2, CHUNK, CHUNK)
    for span in chunk_spans(chunks, heads * CHUNK * CHUNK * width):
        gap = total[:, span].unsqueeze(3) - total[:, span].unsqueeze(2)
        decay = gap.masked_fill_(~causal.unsqueeze(-1), -torch.inf).exp_()
        decayed_keys = decay.mul_(k[:, span].unsqueeze(2))
        pair[:, span] = torch.matmul(rows[:, span], decayed_keys.mT).transpose(2, 3)
    decay = total.exp()
    wu = solve_delta(pair[:, :, 0].tril(-1), torch.cat((k * decay * b, v * b), dim=-1))
    end = total[:, :, -1:]
    return ChunkTerms(
        q_decayed=q * decay * scale,
        k_to_end=k * (end - total).exp(),
        scores=pair[:, :, 1],
        u=wu[..., width:],
        w=wu[..., :width],
        end_decay=end.squeeze(2).exp(),
    )


def chunk_kda(inputs: KdaInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`prfaas_kernels.kda.chunk_kda`, in float32 on any device."""
    x = spread_heads(inputs.q[0], inputs.k[0], inputs.v[0], l2norm=inputs.qk_l2norm)
    gate = inputs.g.reshape(inputs.tokens, inputs.heads, inputs.width).float()
    log_decay = gate if inputs.a_log is None else kda_gate(gate, inputs.a_log, inputs.dt_bias, inputs.lower_bound)
    beta = inputs.beta.reshape(inputs.tokens, inputs.heads).float()
    beta = beta.sigmoid() if inputs.beta_is_raw else beta

    def terms_of(rows: slice) -> ChunkTerms:
        return _terms(x.q[rows], x.k[rows], x.v[rows], log_decay[rows], beta[rows], inputs.score_scale)

    return scan_sequences(inputs, terms_of, chunk=CHUNK)


def kda_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    beta: torch.Tensor,
    *,
    state_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    scale: float | None = None,
    qk_l2norm: bool = True,
) -> torch.Tensor:
    """Decode, one token for each of B requests.

    ``q``, ``k`` ``[B, H, K]``, ``v`` ``[B, HV, V]``, ``log_decay`` ``[B, HV, K]`` (or ``[B, HV, 1]``: one gate per
    head), ``beta`` ``[B, HV]`` in (0, 1); pool and indices as in :func:`chunk_kda`. Rows with index -1 give zeros.
    Returns ``[B, HV, V]`` in the dtype of ``v``.
    """
    query, key, value = spread_heads(q, k, v, l2norm=qk_l2norm)
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    slots = cache_indices.long()
    live = slots >= 0
    state = state_pool[slots.clamp(min=0)].float() * log_decay.float().exp().unsqueeze(2)
    error = (value - (state @ key.unsqueeze(-1)).squeeze(-1)) * beta.float().unsqueeze(-1)
    state = state + error.unsqueeze(-1) * key.unsqueeze(2)
    out = (state @ (query * scale).unsqueeze(-1)).squeeze(-1)
    state_pool[slots[live]] = state[live].to(state_pool.dtype)
    return torch.where(live.view(-1, 1, 1), out, 0.0).to(v.dtype)
