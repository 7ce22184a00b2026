"""KDA that autograd can follow, with small chunks: training on transformers' reference takes ten times as long."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad

CHUNK = 16


def chunk_kda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`query`, `key`, log decay `g` `[B, T, H, K]`, `value` `[B, T, H, V]`, `beta` `[B, T, H]`: as transformers'
    `chunk_kimi_delta_attention`, whose place it takes. Returns `[B, T, H, V]` and the state `[B, H, K, V]`."""
    tokens, width = key.shape[1], key.shape[-1]
    if use_qk_l2norm_in_kernel:
        query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    q, k, v, total, b = (_chunks(x) for x in (query * width**-0.5, key, value, g, beta.unsqueeze(-1)))
    total = total.cumsum(-2)
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool).tril().unsqueeze(-1)
    gap = total.unsqueeze(-2) - total.unsqueeze(-3)
    decayed = gap.masked_fill(~causal, -torch.inf).exp() * k.unsqueeze(-3)
    pairs = decayed @ torch.stack((k * b, q), dim=-1)
    lower, scores = pairs[..., 0].tril(-1), pairs[..., 1]
    decay, end = total.exp(), total[..., -1:, :]
    both = torch.cat((k * decay * b, v * b), dim=-1)
    w, u = torch.linalg.solve_triangular(lower + torch.eye(CHUNK), both, upper=False, unitriangular=True).split(
        [width, v.shape[-1]], dim=-1
    )
    q_decayed, k_to_end, end_decay = q * decay, (k * (end - total).exp()).mT, end.mT.exp()
    state = v.new_zeros(*v.shape[:1], v.shape[2], width, v.shape[-1]) if initial_state is None else initial_state
    out = []
    for n in range(q.shape[1]):
        new = u[:, n] - w[:, n] @ state
        out.append(q_decayed[:, n] @ state + scores[:, n] @ new)
        state = state * end_decay[:, n] + k_to_end[:, n] @ new
    whole = torch.stack(out, 1).transpose(2, 3).flatten(1, 2)[:, :tokens]
    return whole, state if output_final_state else None


def _chunks(x: torch.Tensor) -> torch.Tensor:
    """`[B, T, H, W]` to `[B, chunks, H, CHUNK, W]`, with zeros behind the end."""
    whole = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % CHUNK))
    return whole.unflatten(1, (-1, CHUNK)).transpose(2, 3)
