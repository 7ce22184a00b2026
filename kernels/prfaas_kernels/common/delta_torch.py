"""What KDA and GDN in torch share: keys and values of all heads in float32, and the walk over the sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from prfaas_kernels.common.chunk_scan import ChunkTerms, scan_chunks
from prfaas_kernels.common.delta_inputs import DeltaInputs
from prfaas_kernels.common.maths import l2_normalise, sequence_bounds

STATE_CHUNK = 64
"""Grid of the intermediate states that SGLang asks for."""


class Heads(NamedTuple):
    """``q``, ``k`` ``[T, HV, K]`` normalised where asked for and repeated to all value heads, ``v`` ``[T, HV, V]``."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def spread_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, l2norm: bool) -> Heads:
    """``q``, ``k`` ``[T, H, K]`` and ``v`` ``[T, HV, V]`` of any dtype; T may be requests, one token each."""
    query, key = q.float(), k.float()
    if l2norm:
        query, key = l2_normalise(query), l2_normalise(key)
    groups = v.shape[1] // q.shape[1]
    query, key = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (query, key))
    return Heads(query, key, v.float())


def scan_sequences(
    inputs: DeltaInputs, terms_of: Callable[[slice], ChunkTerms], *, chunk: int, store: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``terms_of`` gives what the chunks of ``chunk`` tokens (a divisor of 64) of some rows contribute.

    Returns ``o`` ``[1, T, HV, V]`` in the dtype of v and, if ``inputs`` asks for them, the states at the starts of
    64-token chunks ``[1, chunks, HV, V, K]`` float32.
    """
    pool, v = inputs.state_pool, inputs.v
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    chunk_states: list[torch.Tensor] = []
    bounds = sequence_bounds(inputs.tokens, inputs.cu_seqlens)
    tracked = [-1] * len(bounds) if inputs.track_chunk_idx is None else inputs.track_chunk_idx.tolist()
    keep = inputs.return_chunk_states or any(index >= 0 for index in tracked)
    for n, ((begin, end), slot) in enumerate(zip(bounds, inputs.cache_indices.tolist(), strict=True)):
        if begin == end:
            continue
        rows = slice(begin, end)
        state = torch.zeros(inputs.heads, inputs.width, v.shape[3], device=v.device)
        if slot >= 0:
            state = pool[slot].float().mT
        result = scan_chunks(terms_of(rows), state, keep_starts=keep)
        out[0, rows] = result.o.flatten(1, 2)[:, : end - begin].transpose(0, 1).to(v.dtype)
        if store and slot >= 0:
            pool[slot] = result.state.mT.to(pool.dtype)
        if result.starts is not None:
            starts = result.starts[:: STATE_CHUNK // chunk].mT
            chunk_states.append(starts)
            if tracked[n] >= 0 and inputs.track_state is not None:
                inputs.track_state[n] = starts[tracked[n]].to(inputs.track_state.dtype)
    return out, torch.cat(chunk_states).unsqueeze(0) if inputs.return_chunk_states and chunk_states else None
