"""GDN chunkwise in vectorised torch, float32; any device, no Triton. No exponent is positive."""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_scan import ChunkTerms, scan_chunks, solve_delta
from prfaas_kernels.common.maths import l2_normalise, pad_to_chunks, sequence_bounds
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prefill: SGLang's ``extend`` contract (srt/layers/attention/linear/gdn_backend.py, 0.5.23).

    ``q``, ``k`` ``[1, T, Hk, K]``, ``v`` ``[1, T, HV, V]``, ``log_decay`` (<= 0) and ``beta`` (in (0, 1))
    ``[1, T, HV]``.
    ``state_pool`` ``[slots, HV, V, K]`` is read and, if ``store_state``, updated in place at ``cache_indices`` ``[N]``;
    -1 means start from zeros and store nothing. ``track_state`` ``[N, HV, V, K]`` receives, where
    ``track_chunk_idx[n] >= 0``, the state at the start of that 64-token chunk. Returns ``o`` ``[1, T, HV, V]`` in the
    dtype of ``v`` and, if asked, the states at the start of every 64-token chunk ``[1, chunks, HV, V, K]`` float32.
    Inputs are not changed.
    """
    heads, width = v.shape[2], k.shape[3]
    scale = width**-0.5 if scale is None else scale
    query, key, value = q[0].float(), k[0].float(), v[0].float()
    if qk_l2norm:
        query, key = l2_normalise(query), l2_normalise(key)
    groups = heads // query.shape[1]
    query, key = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (query, key))
    gate, rate = log_decay[0].float(), beta[0].float()

    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    chunk_states: list[torch.Tensor] = []
    tracked = [-1] * (cu_seqlens.shape[0] - 1) if track_chunk_idx is None else track_chunk_idx.tolist()
    keep = return_chunk_states or any(index >= 0 for index in tracked)
    bounds = sequence_bounds(q.shape[1], cu_seqlens)
    for n, ((begin, end), slot) in enumerate(zip(bounds, cache_indices.tolist(), strict=True)):
        if begin == end:
            continue
        rows = slice(begin, end)
        terms = _terms(query[rows], key[rows], value[rows], gate[rows], rate[rows], scale)
        state = value.new_zeros(heads, width, v.shape[3]) if slot < 0 else state_pool[slot].float().mT
        result = scan_chunks(terms, state, keep_starts=keep)
        out[0, rows] = result.o.flatten(1, 2)[:, : end - begin].transpose(0, 1).to(v.dtype)
        if store_state and slot >= 0:
            state_pool[slot] = result.state.mT.to(state_pool.dtype)
        if result.starts is not None:
            chunk_states.append(result.starts.mT)
            if tracked[n] >= 0 and track_state is not None:
                track_state[n] = result.starts[tracked[n]].mT.to(track_state.dtype)
    return out, torch.cat(chunk_states).unsqueeze(0) if return_chunk_states and chunk_states else None


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
