"""Rotary embedding on a CPU for architectures that expect SGLang's CUDA or AMX kernels."""

from __future__ import annotations

from typing import Any

import torch


def get_rope_cpu(
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: int,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    partial_rotary_factor: float = 1.0,
    device: str | None = None,
) -> torch.nn.Module:
    """SGLang's general factory: every kind of scaling it knows, through the torch-native path of this platform."""
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    return get_rope(
        head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, dtype, partial_rotary_factor
    )


def forward_cuda(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: object = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some models call the CUDA path by name; the result is that of the layer's own ``forward_native``."""
    if fused_set_kv_buffer_arg is not None:
        raise NotImplementedError("rotary embedding fused with the cache write is not served by the CPU platform")
    rotated: tuple[torch.Tensor, torch.Tensor] = self.forward_native(positions, query, key, offsets)
    return rotated
