"""What SGLang's dispatchers call for prefill, and the Lightning method around `seg_la_fwd`.

The classes are SGLang's Triton kernels with another ``extend``: decode, verification and graphs stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from prfaas_kernels import gdn, kda, lightning
from sglang.srt.layers.attention.linear.kernels.gdn_triton import TritonGDNKernel
from sglang.srt.layers.attention.linear.kernels.kda_triton import TritonKDAKernel

from sglang_prfaas.sglang_plugin.linear_attention import contracts


class PrfaasKDAKernel(TritonKDAKernel):
    """KDA prefill; what :mod:`contracts` refuses goes to SGLang's Triton kernel."""

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        A_log: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        lower_bound: float | None = None,
        beta_is_raw: bool = False,
        return_intermediate_states: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """``q``, ``k`` ``[1, T, H, K]``, ``v`` ``[1, T, HV, V]``, raw gate ``g`` ``[1, T, HV, K]``, ``beta``
        ``[1, T, HV]``; ``ssm_states`` ``[slots, HV, V, K]`` is updated in place. Inputs are not changed.

        Returns ``[1, T, HV, V]``; with ``return_intermediate_states`` also the states at the starts of chunks
        ``[1, chunks, HV, V, K]``, or None where ``track_state`` holds the ones that are wanted.
        """
        reason = contracts.delta_obstacle(q, k, v, g, beta, ssm_states, cache_indices, query_start_loc)
        reason = reason or contracts.kda_obstacle(
            A_log, dt_bias, v.shape[2], k.shape[3], speculative=bool(kwargs.get("is_spec_decode"))
        )
        if reason is not None:
            contracts.log_fallback("KDA", reason)
            return super().extend(
                q,
                k,
                v,
                g,
                beta,
                ssm_states=ssm_states,
                cache_indices=cache_indices,
                query_start_loc=query_start_loc,
                A_log=A_log,
                dt_bias=dt_bias,
                lower_bound=lower_bound,
                beta_is_raw=beta_is_raw,
                return_intermediate_states=return_intermediate_states,
                **kwargs,
            )
        track_state = kwargs.get("track_state")
        out, states = kda.chunk_kda(
            kda.KdaInputs(
                q=q,
                k=k,
                v=v,
                g=g,
                beta=beta,
                state_pool=ssm_states,
                cache_indices=cache_indices,
                cu_seqlens=query_start_loc,
                a_log=A_log,
                dt_bias=dt_bias,
                lower_bound=lower_bound,
                beta_is_raw=beta_is_raw,
                # States of all chunks cost memory and a wait for the device: only where the snapshot does not do.
                return_chunk_states=return_intermediate_states and track_state is None,
                track_state=track_state,
                track_chunk_idx=kwargs.get("track_chunk_idx"),
                max_seqlen=contracts.longest_tokens(kwargs.get("extend_seq_lens_cpu")),
            )
        )
        return (out, states) if return_intermediate_states else out


class PrfaasGDNKernel(TritonGDNKernel):
    """GDN prefill; what :mod:`contracts` refuses goes to SGLang's Triton kernel.

    Writes the one state that SGLang keeps of a sequence (``track_state``), so it never returns those of all chunks.
    """

    supports_track_state_snapshot: bool = True

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        ssm_states: torch.Tensor,
        cache_indices: torch.Tensor,
        query_start_loc: torch.Tensor,
        inplace_update: bool = True,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """``q``, ``k`` ``[1, T, H, K]``, ``v`` ``[1, T, HV, V]``, log decay ``g`` and activated ``beta``
        ``[1, T, HV]``; ``ssm_states`` ``[slots, HV, V, K]`` is updated in place if ``inplace_update``.

        Returns ``(o [1, T, HV, V], None, None)``.
        """
        track_state, track_chunk_idx = kwargs.get("track_state"), kwargs.get("track_chunk_idx")
        reason = contracts.delta_obstacle(q, k, v, g, beta, ssm_states, cache_indices, query_start_loc)
        if reason is not None:
            contracts.log_fallback("GDN", reason)
            out, last, states = super().extend(
                q,
                k,
                v,
                g,
                beta,
                ssm_states=ssm_states,
                cache_indices=cache_indices,
                query_start_loc=query_start_loc,
                inplace_update=inplace_update,
                **kwargs,
            )
            if track_state is not None:
                track_state.copy_(contracts.snapshot_rows(states, track_chunk_idx, query_start_loc))
            return out, last, states
        out, _ = gdn.chunk_gdn(
            gdn.GdnInputs(
                q=q,
                k=k,
                v=v,
                log_decay=g,
                beta=beta,
                state_pool=ssm_states,
                cache_indices=cache_indices,
                cu_seqlens=query_start_loc,
                store_state=inplace_update,
                track_state=track_state,
                track_chunk_idx=track_chunk_idx,
            )
        )
        return out, None, None


def lightning_entry(
    original: Callable[..., torch.Tensor],
    self: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_cache: torch.Tensor,
    state_indices_tensor: torch.Tensor,
    metadata: Any,
    layer: Any,
    mask: torch.Tensor | None = None,
    temp_cache: torch.Tensor | None = None,
    intermediate_state_indices: torch.Tensor | None = None,
    track_lens: torch.Tensor | None = None,
    track_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """AROUND `LightningAttentionBackend._linear_attention_entry`: prefill on ours, decode and verification as before.

    ``q``, ``k``, ``v`` ``[T, H, D]``; ``kv_cache`` ``[slots, H, K, V]`` is updated in place. Returns ``[T, H, D]``.
    """
    prefill = metadata.num_prefills > 0 and mask is None and temp_cache is None
    reason = None
    if prefill:
        reason = contracts.lightning_obstacle(q, k, v, kv_cache, state_indices_tensor, metadata.query_start_loc)
        if reason is not None:
            contracts.log_fallback("Lightning", reason)
    if not prefill or reason is not None:
        return original(
            self,
            q,
            k,
            v,
            kv_cache,
            state_indices_tensor,
            metadata,
            layer,
            mask=mask,
            temp_cache=temp_cache,
            intermediate_state_indices=intermediate_state_indices,
            track_lens=track_lens,
            track_state_indices=track_state_indices,
        )
    return lightning.chunk_lightning(
        lightning.LightningInputs(
            q=q,
            k=k,
            v=v,
            slopes=self.tp_slope[layer.layer_id],
            state_pool=kv_cache,
            cache_indices=state_indices_tensor,
            cu_seqlens=metadata.query_start_loc,
            has_initial_state=metadata.has_initial_states,
            scale=layer.scaling,
            track_lens=track_lens,
            track_slots=track_state_indices,
        )
    )
