"""GDN chunkwise in vectorised torch, float32; any device, no Triton. No exponent is positive."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_scan import ChunkTerms, solve_delta
from prfaas_kernels.common.delta_torch import scan_sequences, spread_heads
from prfaas_kernels.common.maths import pad_to_chunks
from prfaas_kernels.gdn.inputs import GdnInputs
from prfaas_kernels.kda.chunk_torch import kda_step

CHUNK = 64


def _terms(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, beta: torch.Tensor, scale: float
) -> ChunkTerms:
    """One sequence, heads already repeated: ``[T, HV, .]``, ``log_decay`` and ``beta`` ``[T, HV]``."""
    q, k, v = (pad_to_chunks(x, CHUNK) for x in (q, k, v))
    b = pad_to_chunks(beta.unsqueeze(-1), CHUNK)
    total = pad_to_chunks(log_decay.unsqueeze(-1), CHUNK).cumsum(2)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    between = (total - total.mT).masked_fill(~causal, -torch.inf).exp()
    decay, end = total.exp(), total[:, :, -1:]
    lower = ((k * b) @ k.mT * between).tril(-1)
    wu = solve_delta(lower, torch.cat((k * decay * b, v * b), dim=-1))
    return ChunkTerms(
        q_decayed=q * decay * scale,
        k_to_end=k * (end - total).exp(),
        scores=(q * scale) @ k.mT * between,
        u=wu[..., k.shape[-1] :],
        w=wu[..., : k.shape[-1]],
        end_decay=end.squeeze(2).exp(),
    )


def chunk_gdn(inputs: GdnInputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`prfaas_kernels.gdn.chunk_gdn`, in float32 on any device."""
    x = spread_heads(inputs.q[0], inputs.k[0], inputs.v[0], l2norm=inputs.qk_l2norm)
    log_decay, beta = inputs.log_decay[0].float(), inputs.beta[0].float()

    def terms_of(rows: slice) -> ChunkTerms:
        return _terms(x.q[rows], x.k[rows], x.v[rows], log_decay[rows], beta[rows], inputs.score_scale)

    return scan_sequences(inputs, terms_of, chunk=CHUNK, store=inputs.store_state)


def gdn_step(
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
    """Decode, one token per request: :func:`prfaas_kernels.kda.kda_step` with ``log_decay`` ``[B, HV]``."""
    return kda_step(
        q,
        k,
        v,
        log_decay.unsqueeze(-1),
        beta,
        state_pool=state_pool,
        cache_indices=cache_indices,
        scale=scale,
        qk_l2norm=qk_l2norm,
    )
