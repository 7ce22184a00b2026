"""Causal softmax attention over a prefix and new tokens in float64: the truth of the tests."""

from __future__ import annotations

import torch

from prfaas_kernels.common.maths import sequence_bounds


def gather_prefix(pool: torch.Tensor, pages: torch.Tensor, length: int, page_size: int) -> torch.Tensor:
    """The first ``length`` tokens: ``pool`` ``[slots, Hkv, D]``, ``pages`` ``[P]`` to ``[length, Hkv, D]``."""
    token = torch.arange(length, device=pool.device)
    return pool[pages[token // page_size].long() * page_size + token % page_size]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """One sequence: ``q`` ``[T, H, K]`` are its last T tokens, ``k`` ``[S, Hkv, K]``, ``v`` ``[S, Hkv, V]``, S >= T.

    Returns ``[T, H, V]`` float64.
    """
    q, k, v = (x.double() for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = scale * torch.einsum("thd,shd->hts", q, k)
    seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril(k.shape[0] - q.shape[0])
    return torch.einsum("hts,shv->thv", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def naive_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    *,
    cu_seqlens: torch.Tensor,
    k_pool: torch.Tensor | None = None,
    v_pool: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    prefix_lens: torch.Tensor | None = None,
    page_size: int = 1,
    value_width: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """As :func:`prfaas_kernels.full_attention.prefill_attention`, in float64."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    width = value_width if v is None else v.shape[-1]
    out = q.new_zeros(q.shape[0], q.shape[1], width, dtype=torch.float64)
    for n, (begin, end) in enumerate(sequence_bounds(q.shape[0], cu_seqlens)):
        keys, values = k[begin:end], None if v is None else v[begin:end]
        if k_pool is not None and page_table is not None and prefix_lens is not None:
            length = int(prefix_lens[n])
            keys = torch.cat((gather_prefix(k_pool, page_table[n], length, page_size), keys))
            if values is not None and v_pool is not None:
                values = torch.cat((gather_prefix(v_pool, page_table[n], length, page_size), values))
        if values is None:
            values = keys[..., :width]
        out[begin:end] = attend(q[begin:end], keys, values, scale)
    return out
