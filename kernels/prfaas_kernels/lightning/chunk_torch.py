"""Lightning attention chunkwise in vectorised torch, float32; any device, no Triton. No exponent is positive."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_scan import ChunkTerms, scan_chunks
from prfaas_kernels.common.maths import pad_to_chunks, sequence_bounds
from prfaas_kernels.lightning.inputs import LightningInputs

CHUNK = 64


def _terms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor, scale: float) -> ChunkTerms:
    """One sequence ``[T, H, .]``, ``slopes`` ``[H]``. A padded tail has its decay taken out of ``end``."""
    tokens = q.shape[0]
    q, k, v = (pad_to_chunks(x, CHUNK) for x in (q, k, v))
    steps = torch.ones(tokens, 1, 1, device=q.device)
    total = -slopes.view(-1, 1, 1, 1) * pad_to_chunks(steps, CHUNK).cumsum(2)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    between = (total - total.mT).masked_fill(~causal, -torch.inf).exp()
    end = total[:, :, -1:]
    return ChunkTerms(
        q_decayed=q * total.exp() * scale,
        k_to_end=k * (end - total).exp(),
        scores=(q * scale) @ k.mT * between,
        u=v,
        w=None,
        end_decay=end.squeeze(2).exp(),
    )


def chunk_lightning(inputs: LightningInputs) -> torch.Tensor:
    """As :func:`prfaas_kernels.lightning.chunk_lightning`, in float32 on any device.

    Raises ValueError where ``track_lens`` is no multiple of 64 below a sequence's length.
    """
    q, k, v, pool = inputs.q, inputs.k, inputs.v, inputs.state_pool
    slopes = inputs.slopes.float().reshape(-1)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    bounds = sequence_bounds(q.shape[0], inputs.cu_seqlens)
    warm = [True] * len(bounds) if inputs.has_initial_state is None else inputs.has_initial_state.tolist()
    targets = [-1] * len(bounds) if inputs.track_slots is None else inputs.track_slots.tolist()
    for n, ((begin, end), slot) in enumerate(zip(bounds, inputs.cache_indices.tolist(), strict=True)):
        if begin == end:
            continue
        rows = slice(begin, end)
        terms = _terms(q[rows].float(), k[rows].float(), v[rows].float(), slopes, inputs.score_scale)
        state = torch.zeros(pool.shape[1:], device=q.device)
        if slot >= 0 and warm[n]:
            state = pool[slot].float()
        result = scan_chunks(terms, state, keep_starts=targets[n] >= 0)
        out[rows] = result.o.flatten(1, 2)[:, : end - begin].transpose(0, 1).to(q.dtype)
        if slot >= 0:
            pool[slot] = result.state.to(pool.dtype)
        if targets[n] >= 0 and inputs.track_lens is not None and result.starts is not None:
            length = int(inputs.track_lens[n])
            if length % CHUNK or length >= end - begin:
                raise ValueError(f"track_lens must be a multiple of {CHUNK} below {end - begin} tokens, got {length}")
            pool[targets[n]] = result.starts[length // CHUNK].to(pool.dtype)
    return out


def lightning_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slopes: torch.Tensor,
    *,
    state_pool: torch.Tensor,
    cache_indices: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Decode, one token for each of B requests: ``[B, H, D]`` to ``[B, H, D]``; rows with index -1 give zeros."""
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    slots = cache_indices.long()
    live = slots >= 0
    decay = (-slopes.float().reshape(-1)).exp().view(1, -1, 1, 1)
    state = state_pool[slots.clamp(min=0)].float() * decay + k.float().unsqueeze(-1) * v.float().unsqueeze(-2)
    out = ((q.float() * scale).unsqueeze(-2) @ state).squeeze(-2)
    state_pool[slots[live]] = state[live].to(state_pool.dtype)
    return torch.where(live.view(-1, 1, 1), out, 0.0).to(q.dtype)
