"""KDA chunkwise in vectorised torch, float32; any device, no Triton.

Exponents are formed as differences ``G_i - G_j`` with i >= j before ``exp``, so none is positive and strong gates
(hundreds of nats in a chunk) underflow to zero instead of overflowing.
"""

from __future__ import annotations

import torch

from prfaas_kernels.common.chunk_scan import ChunkTerms, scan_chunks, solve_delta
from prfaas_kernels.common.maths import chunk_spans, l2_normalise, pad_to_chunks, sequence_bounds
from prfaas_kernels.kda.naive import kda_gate

CHUNK = 32
STATE_CHUNK = 64  # Grid of the intermediate states that SGLang asks for.


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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prefill: SGLang's ``extend`` contract (srt/layers/attention/linear/kda_backend.py, 0.5.23).

    ``q``, ``k`` ``[1, T, H, K]``, ``v`` ``[1, T, HV, V]`` of any strides; ``g`` ``[1, T, HV, K]``: raw gate if
    ``a_log`` is given, else log decay; ``beta`` ``[1, T, HV]``: logits if ``beta_is_raw``.
    ``state_pool`` ``[slots, HV, V, K]`` is read and updated in place at ``cache_indices`` ``[N]``; -1 means start
    from zeros, store nothing.
    ``track_state`` ``[N, HV, V, K]`` receives, where ``track_chunk_idx[n] >= 0``, the state at the start of that
    64-token chunk. Returns ``o`` ``[1, T, HV, V]`` in the dtype of ``v`` and, if asked, the states at the start of
    every 64-token chunk ``[1, chunks, HV, V, K]`` float32. Inputs are not changed.
    """
    heads, width = v.shape[2], k.shape[3]
    scale = width**-0.5 if scale is None else scale
    g = g.reshape(1, g.shape[1], heads, width)[0].float()
    log_decay = g if a_log is None else kda_gate(g, a_log, dt_bias, lower_bound)
    beta = beta.reshape(1, beta.shape[1], heads)[0].float()
    beta = beta.sigmoid() if beta_is_raw else beta
    query, key = q[0].float(), k[0].float()
    if qk_l2norm:
        query, key = l2_normalise(query), l2_normalise(key)
    groups = heads // query.shape[1]
    query, key = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (query, key))
    value = v[0].float()

    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    chunk_states: list[torch.Tensor] = []
    tracked = [-1] * (cu_seqlens.shape[0] - 1) if track_chunk_idx is None else track_chunk_idx.tolist()
    keep = return_chunk_states or any(index >= 0 for index in tracked)
    bounds = sequence_bounds(q.shape[1], cu_seqlens)
    for n, ((begin, end), slot) in enumerate(zip(bounds, cache_indices.tolist(), strict=True)):
        if begin == end:
            continue
        rows = slice(begin, end)
        terms = _terms(query[rows], key[rows], value[rows], log_decay[rows], beta[rows], scale)
        state = value.new_zeros(heads, width, v.shape[3]) if slot < 0 else state_pool[slot].float().mT
        result = scan_chunks(terms, state, keep_starts=keep)
        out[0, rows] = result.o.flatten(1, 2)[:, : end - begin].transpose(0, 1).to(v.dtype)
        if slot >= 0:
            state_pool[slot] = result.state.mT.to(state_pool.dtype)
        if keep and result.starts is not None:
            starts = result.starts[:: STATE_CHUNK // CHUNK].mT
            chunk_states.append(starts)
            if tracked[n] >= 0 and track_state is not None:
                track_state[n] = starts[tracked[n]].to(track_state.dtype)
    return out, torch.cat(chunk_states).unsqueeze(0) if return_chunk_states and chunk_states else None


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
    query, key, value = q.float(), k.float(), v.float()
    if qk_l2norm:
        query, key = l2_normalise(query), l2_normalise(key)
    groups = v.shape[1] // q.shape[1]
    query, key = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (query, key))
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    slots = cache_indices.long()
    live = slots >= 0
    state = state_pool[slots.clamp(min=0)].float() * log_decay.float().exp().unsqueeze(2)
    error = (value - (state @ key.unsqueeze(-1)).squeeze(-1)) * beta.float().unsqueeze(-1)
    state = state + error.unsqueeze(-1) * key.unsqueeze(2)
    out = (state @ (query * scale).unsqueeze(-1)).squeeze(-1)
    state_pool[slots[live]] = state[live].to(state_pool.dtype)
    return torch.where(live.view(-1, 1, 1), out, 0.0).to(v.dtype)
