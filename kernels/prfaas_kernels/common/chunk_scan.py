"""The serial part of chunkwise linear attention: carry the state from chunk to chunk.

Per chunk, with ``G`` the cumulative log decay inside the chunk (all exponents are <= 0)::

    V' = U - W S            (delta rule; V' = U without one)
    O  = Qg S + A V'
    S  = exp(G_end) * S + Kg^T V'
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class ChunkTerms(NamedTuple):
    """What a chunk contributes, for H heads, N chunks of C tokens; all float32.

    ``q_decayed`` and ``k_to_end`` ``[H, N, C, K]``, ``scores`` (causal, scaled) ``[H, N, C, C]``,
    ``u`` ``[H, N, C, V]``, ``w`` ``[H, N, C, K]`` or None without a delta rule,
    ``end_decay`` ``[H, N, K or 1]``.
    """

    q_decayed: torch.Tensor
    k_to_end: torch.Tensor
    scores: torch.Tensor
    u: torch.Tensor
    w: torch.Tensor | None
    end_decay: torch.Tensor


class ScanResult(NamedTuple):
    """``o`` ``[H, N, C, V]``, ``state`` after the last chunk ``[H, K, V]``, ``starts`` ``[N, H, K, V]`` or None."""

    o: torch.Tensor
    state: torch.Tensor
    starts: torch.Tensor | None


def scan_chunks(terms: ChunkTerms, state: torch.Tensor, *, keep_starts: bool = False) -> ScanResult:
    """Run the recurrence over chunks from ``state`` ``[H, K, V]``.

    With ``keep_starts`` the state at the start of each chunk is returned too.
    """
    chunks = terms.u.shape[1]
    outputs: list[torch.Tensor] = []
    starts: list[torch.Tensor] = []
    for n in range(chunks):
        if keep_starts:
            starts.append(state)
        value = terms.u[:, n]
        if terms.w is not None:
            value = torch.baddbmm(value, terms.w[:, n], state, alpha=-1.0)
        outputs.append(torch.baddbmm(torch.bmm(terms.q_decayed[:, n], state), terms.scores[:, n], value))
        state = torch.baddbmm(state * terms.end_decay[:, n].unsqueeze(-1), terms.k_to_end[:, n].mT, value)
    return ScanResult(torch.stack(outputs, 1), state, torch.stack(starts) if keep_starts else None)


def solve_delta(lower: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """``(I + lower)^-1 rhs`` for a strictly lower triangular ``lower`` ``[..., C, C]``."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower + eye, rhs, upper=False, unitriangular=True)
