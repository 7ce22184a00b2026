"""Which prefill inputs our kernels take from SGLang. What they do not take stays with SGLang's own kernel.

Shapes: T tokens in one packed batch of N sequences, H key heads, HV value heads, widths K and V.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from prfaas_kernels.common.dispatch import obstacle as kernel_obstacle

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
CHUNK = 64
"""Grid of the states that SGLang asks for at the starts of chunks."""


@functools.cache
def log_fallback(operator: str, reason: str) -> None:
    """Once for each operator and reason."""
    logger.warning("prfaas: prefill of %s stays with SGLang's own kernel: %s", operator, reason)


def _sequences(query_start_loc: torch.Tensor, cache_indices: torch.Tensor) -> str | None:
    if query_start_loc.shape[0] - 1 != cache_indices.shape[0]:
        return f"{cache_indices.shape[0]} state slots for {query_start_loc.shape[0] - 1} sequences"
    return None


def _device(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
    """On a CPU prfaas_kernels has torch to fall back to; on a GPU SGLang's kernel is the better one."""
    return None if q.device.type == "cpu" else kernel_obstacle(q, k, v)


def delta_obstacle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate: torch.Tensor,
    beta: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> str | None:
    """Why KDA and GDN can't run on ours, or None.

    ``q``, ``k`` ``[1, T, H, K]``, ``v`` ``[1, T, HV, V]``, any strides but the innermost; ``gate`` ``[1, T, HV, K]`` or
    ``[1, T, HV]``, ``beta`` ``[1, T, HV]``; ``ssm_states`` ``[slots, HV, V, K]``.
    """
    if q.dim() != 4 or q.shape[0] != 1:
        return f"q has shape {tuple(q.shape)}, expected one packed batch [1, T, H, K]"
    tokens, heads, value_width, width = v.shape[1], v.shape[2], v.shape[3], k.shape[3]
    if tuple(ssm_states.shape[1:]) != (heads, value_width, width):
        return f"states of shape {tuple(ssm_states.shape[1:])}, expected [HV, V, K] = {(heads, value_width, width)}"
    if gate.numel() not in (tokens * heads, tokens * heads * width) or beta.numel() != tokens * heads:
        return f"gate {tuple(gate.shape)} and beta {tuple(beta.shape)} do not fit {tokens} tokens of {heads} heads"
    if gate.dim() == 4 and gate.stride(-1) != 1:
        return "the innermost dimension of the gate is strided"
    return _sequences(query_start_loc, cache_indices) or _device(q, k, v)


def kda_obstacle(
    a_log: torch.Tensor | None, dt_bias: torch.Tensor | None, heads: int, width: int, *, speculative: bool
) -> str | None:
    """What KDA asks for beyond :func:`delta_obstacle`: parameters of the gate, one set per value head."""
    if speculative:
        return "a speculative draft must not commit its states"
    if a_log is not None and a_log.numel() != heads:
        return f"A_log has {a_log.numel()} values for {heads} value heads"
    if dt_bias is not None and dt_bias.numel() != heads * width:
        return f"dt_bias has {dt_bias.numel()} values, expected HV K = {heads * width}"
    if any(x is not None and not x.is_contiguous() for x in (a_log, dt_bias)):
        return "A_log or dt_bias is strided"
    return None


def lightning_obstacle(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ssm_states: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
) -> str | None:
    """Why Lightning can't run on ours, or None.

    ``q``, ``k``, ``v`` ``[T, H, D]``; ``ssm_states`` ``[slots, H, K, V]``.
    """
    if q.dim() != 3 or q.shape[1:] != k.shape[1:]:
        return f"q and k have shapes {tuple(q.shape)} and {tuple(k.shape)}, expected [T, H, D] twice"
    if tuple(ssm_states.shape[1:]) != (v.shape[1], k.shape[2], v.shape[2]):
        return f"states of shape {tuple(ssm_states.shape[1:])} do not fit {v.shape[1]} heads"
    return _sequences(query_start_loc, cache_indices) or _device(q, k, v)


def longest_tokens(lengths_cpu: Sequence[int] | torch.Tensor | None) -> int | None:
    """The longest of a batch's new lengths, which SGLang keeps on the host; None where they are not at hand there."""
    if lengths_cpu is None or len(lengths_cpu) == 0 or getattr(lengths_cpu, "device", CPU) != CPU:
        return None
    return int(max(lengths_cpu))


def snapshot_rows(
    chunk_states: torch.Tensor, track_chunk_idx: torch.Tensor, query_start_loc: torch.Tensor
) -> torch.Tensor:
    """States at the starts of tracked chunks, out of those of all chunks.

    ``chunk_states`` ``[1, chunks, HV, V, K]``, the sequences' chunks one after another; ``track_chunk_idx`` ``[N]``
    counts within a sequence, -1 where nothing is tracked (that row is arbitrary). Returns ``[N, HV, V, K]``.
    """
    chunks = (query_start_loc.diff() + CHUNK - 1) // CHUNK
    first = chunks.cumsum(0) - chunks
    return chunk_states[0, (first + track_chunk_idx.clamp(min=0)).clamp(max=chunk_states.shape[1] - 1)]
