"""SGLang's linear-attention entry points on top of the torch kernels; same names and parameters as theirs.

Torch also under ``TRITON_INTERPRET=1``: Triton runs where ``--linear-attn-prefill-backend prfaas`` asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
from prfaas_kernels import gdn, kda, lightning
from prfaas_kernels.common import causal_conv1d, causal_conv1d_step


def _refuse(feature: str, *values: object) -> None:
    if any(value is not None and value is not False for value in values):
        raise NotImplementedError(f"{feature} is not served by the CPU platform")


def causal_conv1d_fn(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: list[int],
    cache_indices: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    activation: str | bool | None = "silu",
    pad_slot_id: int = -1,
    validate_data: bool = False,
    block_table: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """``x`` ``[D, T]``; see :func:`prfaas_kernels.common.causal_conv1d`."""
    return causal_conv1d(
        x,
        weight,
        bias,
        conv_states=conv_states,
        cu_seqlens=query_start_loc,
        cache_indices=cache_indices,
        has_initial_state=has_initial_state,
        activation=_activation(activation),
        no_slot=pad_slot_id,
    )


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | bool | None = None,
    cache_seqlens: torch.Tensor | None = None,
    conv_state_indices: torch.Tensor | None = None,
    num_accept_tokens: torch.Tensor | None = None,
    intermediate_conv_window: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    retrieve_next_token: torch.Tensor | None = None,
    retrieve_next_sibling: torch.Tensor | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    pad_slot_id: int = -1,
    metadata: object = None,
    validate_data: bool = False,
) -> torch.Tensor:
    """``x`` ``[B, D]``, one token per request."""
    _refuse("speculative verification", num_accept_tokens, intermediate_conv_window, retrieve_next_token)
    _refuse("a circular convolution cache", cache_seqlens)
    if x.dim() != 2:
        raise NotImplementedError(f"the CPU platform decodes one token per request, got shape {tuple(x.shape)}")
    return causal_conv1d_step(
        x,
        weight,
        bias,
        conv_states=conv_state,
        cache_indices=conv_state_indices,
        activation=_activation(activation),
        no_slot=pad_slot_id,
    )


def _activation(name: str | bool | None) -> str | None:
    if isinstance(name, bool):
        return "silu" if name else None
    return name


def chunk_kda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    lower_bound: float | None = None,
    output_intermediate_states: bool = False,
    track_state: torch.Tensor | None = None,
    track_chunk_idx: torch.Tensor | None = None,
    beta_is_raw: bool = False,
    chunk_indices: torch.Tensor | None = None,
    chunk_offsets: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """KDA prefill; see :func:`prfaas_kernels.kda.chunk_kda`."""
    assert initial_state is not None
    assert initial_state_indices is not None
    assert cu_seqlens is not None
    inputs = kda.KdaInputs(
        q=q,
        k=k,
        v=v,
        g=g,
        beta=beta,
        state_pool=initial_state,
        cache_indices=initial_state_indices,
        cu_seqlens=cu_seqlens,
        a_log=A_log,
        dt_bias=dt_bias,
        lower_bound=lower_bound,
        beta_is_raw=beta_is_raw,
        qk_l2norm=use_qk_l2norm_in_kernel,
        scale=scale,
        return_chunk_states=output_intermediate_states,
        track_state=track_state,
        track_chunk_idx=track_chunk_idx,
    )
    out, states = kda.chunk_kda(inputs, backend="torch")
    return (out, states) if output_intermediate_states else out


def _unpack(mixed: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[B, q|k|v]`` to ``[B, H, K]`` twice and ``[B, HV, V]``; heads follow from the state's ``[.., HV, V, K]``."""
    heads, value_width, key_width = state.shape[-3:]
    key_heads = (mixed.shape[1] - heads * value_width) // (2 * key_width)
    q, k, v = mixed.split([key_heads * key_width, key_heads * key_width, heads * value_width], dim=-1)
    return q.unflatten(-1, (-1, key_width)), k.unflatten(-1, (-1, key_width)), v.unflatten(-1, (heads, value_width))


def fused_recurrent_kda_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    lower_bound: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KDA decode into ``out`` ``[B, 1, HV, V]``; raw gate ``a`` ``[B, HV*K]`` and beta logits ``b`` ``[B, HV]``."""
    q, k, v = _unpack(mixed_qkv, initial_state)
    gate = a.reshape(*v.shape[:2], k.shape[2]).float()
    out[:, 0] = kda.kda_step(
        q,
        k,
        v,
        kda.kda_gate(gate, A_log, dt_bias, lower_bound),
        b.reshape(v.shape[:2]).float().sigmoid(),
        state_pool=initial_state,
        cache_indices=ssm_state_indices,
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return out, initial_state


def fused_sigmoid_gating_delta_rule_update(
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    is_kda: bool = False,
    lower_bound: float | None = None,
    disable_state_update: bool = False,
    intermediate_states_buffer: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: torch.Tensor | None = None,
    cache_ring: bool = False,
    replayssm_rawv: torch.Tensor | None = None,
    replayssm_rawk: torch.Tensor | None = None,
    replayssm_g: torch.Tensor | None = None,
    replayssm_beta: torch.Tensor | None = None,
    match_cutedsl_decode: bool = False,
) -> torch.Tensor:
    """Decode, one token per request packed in ``[1, B, ...]``; KDA or GDN."""
    _refuse("speculative verification", disable_state_update, intermediate_states_buffer, retrieve_parent_token)
    _refuse("replayed state", cache_ring, match_cutedsl_decode)
    batch, heads = v.shape[1], v.shape[2]
    if k.shape[0] != 1 or batch != initial_state_indices.shape[0]:
        raise NotImplementedError(f"the CPU platform decodes one token per request, got shape {tuple(k.shape)}")
    if is_kda:
        gate = kda.kda_gate(a.reshape(batch, heads, k.shape[3]).float(), A_log, dt_bias, lower_bound)
    else:
        gate = gdn.gdn_gate(a.reshape(batch, heads).float(), A_log, dt_bias).unsqueeze(-1)
    return kda.kda_step(
        q[0],
        k[0],
        v[0],
        gate,
        b.reshape(batch, heads).float().sigmoid(),
        state_pool=initial_state_source,
        cache_indices=initial_state_indices,
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
    ).unsqueeze(0)


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    inplace_update: bool = True,
) -> tuple[torch.Tensor, None, torch.Tensor | None]:
    """GDN prefill; see :func:`prfaas_kernels.gdn.chunk_gdn`. The third value holds the states of 64-token chunks."""
    assert initial_state is not None
    assert initial_state_indices is not None
    assert cu_seqlens is not None
    inputs = gdn.GdnInputs(
        q=q,
        k=k,
        v=v,
        log_decay=g,
        beta=beta,
        state_pool=initial_state,
        cache_indices=initial_state_indices,
        cu_seqlens=cu_seqlens,
        qk_l2norm=use_qk_l2norm_in_kernel,
        scale=scale,
        store_state=inplace_update,
        return_chunk_states=True,
    )
    out, states = gdn.chunk_gdn(inputs, backend="torch")
    return out, None, states


def fused_recurrent_gated_delta_rule_packed_decode(
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor,
    out: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GDN decode into ``out`` ``[B, 1, HV, V]``; raw gate ``a`` and beta logits ``b`` ``[B, HV]``."""
    q, k, v = _unpack(mixed_qkv, initial_state)
    out[:, 0] = gdn.gdn_step(
        q,
        k,
        v,
        gdn.gdn_gate(a.float(), A_log, dt_bias),
        b.float().sigmoid(),
        state_pool=initial_state,
        cache_indices=ssm_state_indices,
        scale=scale,
        qk_l2norm=use_qk_l2norm_in_kernel,
    )
    return out, initial_state


def fused_gdn_gating(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    beta: float = 1.0,
    threshold: float = 20.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``a``, ``b`` ``[T, HV]`` to log decay and beta, both ``[1, T, HV]`` float32."""
    return gdn.gdn_gate(a.float(), A_log, dt_bias).unsqueeze(0), b.float().sigmoid().unsqueeze(0)


def seg_la_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    s: torch.Tensor,
    decay_scales: torch.Tensor,
    meta: Any,
    caches: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    track_lens: torch.Tensor | None = None,
    track_state_indices: torch.Tensor | None = None,
    softmax_scale: float | None = None,
) -> torch.Tensor:
    """Lightning attention, prefill and decode; state ``s`` ``[slots, H, K, V]``, ``meta`` is SGLang's SegLaMeta."""
    _refuse("speculative verification", caches, meta.mask)
    if q.shape[0] == meta.batch_size and track_lens is None and bool((meta.q_lengths == 1).all()):
        slots = meta.s_offsets
        if meta.s_scales is not None:
            s[slots[(slots >= 0) & (meta.s_scales[: slots.shape[0]] == 0)].long()] = 0
        return lightning.lightning_step(q, k, v, decay_scales, state_pool=s, cache_indices=slots, scale=softmax_scale)
    inputs = lightning.LightningInputs(
        q=q,
        k=k,
        v=v,
        slopes=decay_scales,
        state_pool=s,
        cache_indices=meta.s_offsets,
        cu_seqlens=meta.q_offsets,
        has_initial_state=meta.s_scales,
        scale=softmax_scale,
        track_lens=track_lens,
        track_slots=track_state_indices,
    )
    return lightning.chunk_lightning(inputs, backend="torch")
