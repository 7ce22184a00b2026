"""Depthwise causal convolution over packed sequences, with a cache of the last ``width - 1`` inputs."""

from __future__ import annotations

import torch

from prfaas_kernels.common.maths import sequence_bounds

NO_SLOT = -1


def _activate(x: torch.Tensor, activation: str | None) -> torch.Tensor:
    if activation is None:
        return x
    if activation in ("silu", "swish"):
        return torch.nn.functional.silu(x)
    raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")


def causal_conv1d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    conv_states: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | None = "silu",
    no_slot: int = NO_SLOT,
) -> torch.Tensor:
    """Convolve each packed sequence and leave its last inputs in its cache slot.

    ``x`` ``[D, T]``, ``weight`` ``[D, width]``, ``bias`` ``[D]``, ``conv_states`` ``[slots, D, >= width - 1]``
    (any strides, updated in place in its first ``width - 1`` columns), ``cu_seqlens`` ``[N+1]``,
    ``cache_indices`` ``[N]`` (None: slot n for sequence n), ``has_initial_state`` ``[N]`` bool (None: none has).
    A sequence whose slot is ``no_slot`` is not processed; its output is zero. Tokens behind the last sequence
    are zero. Returns ``[D, T]`` in the dtype and memory order of ``x``; the sum is taken in float32.
    """
    width = weight.shape[-1]
    kernel = weight.float().unsqueeze(1)
    kernel_bias = None if bias is None else bias.float()
    out = torch.zeros_like(x)
    bounds = sequence_bounds(x.shape[1], cu_seqlens)
    slots = range(len(bounds)) if cache_indices is None else cache_indices.tolist()
    warm = [False] * len(bounds) if has_initial_state is None else has_initial_state.tolist()
    for (begin, end), slot, is_warm in zip(bounds, slots, warm, strict=True):
        if slot == no_slot or begin == end:
            continue
        past = x.new_zeros(x.shape[0], width - 1, dtype=torch.float32)
        if is_warm and conv_states is not None:
            past = conv_states[slot, :, : width - 1].float()
        window = torch.cat((past, x[:, begin:end].float()), dim=1)
        y = torch.nn.functional.conv1d(window.unsqueeze(0), kernel, kernel_bias, groups=x.shape[0])
        out[:, begin:end] = _activate(y[0], activation).to(x.dtype)
        if conv_states is not None:
            conv_states[slot, :, : width - 1] = window[:, window.shape[1] - (width - 1) :].to(conv_states.dtype)
    return out


def causal_conv1d_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    conv_states: torch.Tensor,
    cache_indices: torch.Tensor | None = None,
    activation: str | None = "silu",
    no_slot: int = NO_SLOT,
) -> torch.Tensor:
    """One token per sequence: ``x`` ``[B, D]`` to ``[B, D]``; slots as in :func:`causal_conv1d`, always warm."""
    width = weight.shape[-1]
    rows = torch.arange(x.shape[0], device=x.device)
    slots = rows if cache_indices is None else cache_indices.long()
    live = slots != no_slot
    safe = torch.where(live, slots, 0)
    window = torch.cat((conv_states[safe, :, : width - 1].float(), x.float().unsqueeze(-1)), dim=-1)
    y = (window * weight.float()).sum(-1)
    if bias is not None:
        y = y + bias.float()
    y = torch.where(live.unsqueeze(-1), _activate(y, activation), 0.0)
    conv_states[slots[live], :, : width - 1] = window[live, :, 1:].to(conv_states.dtype)
    return y.to(x.dtype)
