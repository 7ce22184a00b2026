"""Torch versions of SGLang's small Triton kernels; same names and parameters as theirs."""

from __future__ import annotations

import torch


def rms_norm_gated(
    x: torch.Tensor,
    g: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: str = "swish",
    residual: torch.Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """``rmsnorm(x) * weight * act(g)``; ``x`` and ``g`` ``[..., D]`` with the same number of values."""
    if residual is not None or prenorm or residual_in_fp32 or bias is not None:
        raise NotImplementedError("gated RMSNorm with a residual or a bias is not served by the CPU platform")
    value = x.float()
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        value = value * weight.float()
    gate = g.reshape(x.shape).float()
    gate = torch.sigmoid(gate) if activation == "sigmoid" else torch.nn.functional.silu(gate)
    return (value * gate).to(x.dtype)


def fused_qkvzba_split_reshape_cat(
    mixed_qkvz: torch.Tensor,
    mixed_ba: torch.Tensor,
    num_heads_qk: int,
    num_heads_v: int,
    head_qk: int,
    head_v: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Projections grouped by key head to ``mixed_qkv [T, q|k|v]``, ``z [T, HV, V]``, ``b [T, HV]``, ``a [T, HV]``."""
    tokens, group = mixed_qkvz.shape[0], num_heads_v // num_heads_qk
    by_head = mixed_qkvz.reshape(tokens, num_heads_qk, -1)
    q, k, v, z = by_head.split([head_qk, head_qk, group * head_v, group * head_v], dim=-1)
    mixed_qkv = torch.cat([part.reshape(tokens, -1) for part in (q, k, v)], dim=-1)
    b, a = mixed_ba.reshape(tokens, num_heads_qk, 2 * group).split(group, dim=-1)
    heads = (tokens, num_heads_v)
    return mixed_qkv, z.reshape(*heads, head_v), b.reshape(heads).contiguous(), a.reshape(heads).contiguous()


def fused_gate_sigmoid_mul(
    hidden_states: torch.Tensor, gate_weight: torch.Tensor, shared_output: torch.Tensor
) -> torch.Tensor:
    """``shared_output`` ``[T, D]`` times ``sigmoid(hidden_states . gate_weight)``, one gate per token."""
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float()).unsqueeze(-1)
    return (shared_output.float() * gate).to(shared_output.dtype)


def fused_gate_sigmoid_mul_add(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """Add :func:`fused_gate_sigmoid_mul` to ``final_hidden_states`` ``[T, D]`` in place."""
    final_hidden_states += fused_gate_sigmoid_mul(hidden_states, gate_weight, shared_output)


def layernorm_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    z: torch.Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> torch.Tensor:
    """RMSNorm or LayerNorm over groups of ``group_size`` columns, gated by ``act(z)`` behind it (or before it)."""
    value = x.float()
    gate = None if z is None else z.reshape(x.shape).float()
    if gate is not None:
        gate = torch.sigmoid(gate) if activation == "sigmoid" else torch.nn.functional.silu(gate)
        if not norm_before_gate:
            value = value * gate
    groups = value.unflatten(-1, (-1, group_size or value.shape[-1]))
    if not is_rms_norm:
        groups = groups - groups.mean(-1, keepdim=True)
    value = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight.float()
    if bias is not None:
        value = value + bias.float()
    if gate is not None and norm_before_gate:
        value = value * gate
    return value.to(x.dtype)
