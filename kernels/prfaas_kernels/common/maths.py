"""Small functions every operator needs, in the precision of their argument."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

L2_EPS = 1e-6
SOFTPLUS_LINEAR_ABOVE = 20.0


def l2_normalise(x: torch.Tensor) -> torch.Tensor:
    """``x / sqrt(sum(x^2) + 1e-6)`` over the last dimension; shape and dtype of ``x``."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """``log(1 + exp(x))``, exactly ``x`` above 20, as the Triton kernels of SGLang have it."""
    return torch.nn.functional.softplus(x, beta=1.0, threshold=SOFTPLUS_LINEAR_ABOVE)


def sequence_bounds(total_tokens: int, cu_seqlens: torch.Tensor | None) -> list[tuple[int, int]]:
    """``[(begin, end)]`` of each packed sequence.

    ``cu_seqlens`` is ``[N+1]``; None means one sequence of ``total_tokens``.
    Raises ValueError when it does not start at 0, decreases, or ends past ``total_tokens``.
    """
    if cu_seqlens is None:
        return [(0, total_tokens)]
    marks = [int(mark) for mark in cu_seqlens.tolist()]
    if not marks or marks[0] != 0 or marks[-1] > total_tokens or any(a > b for a, b in pairwise(marks)):
        raise ValueError(f"cu_seqlens must rise from 0 to at most {total_tokens} tokens, got {marks}")
    return list(pairwise(marks))


def pad_to_chunks(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """``[T, H, D]`` to ``[H, N, chunk, D]``, the last chunk filled with zeros."""
    tokens, heads, width = x.shape
    chunks = -(-tokens // chunk)
    padded = x.new_zeros(chunks * chunk, heads, width)
    padded[:tokens] = x
    return padded.view(chunks, chunk, heads, width).permute(2, 0, 1, 3)


def chunk_spans(chunks: int, elements_per_chunk: int, limit_elements: int = 1 << 24) -> Iterator[slice]:
    """Slices over ``chunks`` that keep a temporary of ``elements_per_chunk`` each under ``limit_elements``."""
    step = max(1, limit_elements // max(1, elements_per_chunk))
    for begin in range(0, chunks, step):
        yield slice(begin, min(begin + step, chunks))
