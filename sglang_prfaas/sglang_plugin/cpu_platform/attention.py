"""Full and sliding-window attention for SGLang's ``torch_native`` backend; bodies of two of its methods."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


def _locations(
    backend: Any, req_to_token: torch.Tensor, request: int, begin: int, end: int, in_window_pool: bool
) -> torch.Tensor:
    """Rows of the key and value buffers that hold tokens ``[begin, end)`` of a request."""
    rows = req_to_token[request, begin:end].long()
    if in_window_pool:
        return backend.token_to_kv_pool.translate_loc_from_full_to_swa(rows).long()
    return rows


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    first_query: int,
    first_key: int,
    causal: bool,
    window: int | None,
    scaling: float | None,
    enable_gqa: bool,
) -> torch.Tensor:
    """``query`` ``[Tq, H, D]`` at positions from ``first_query``, keys ``[Tk, Hk, D]`` from ``first_key``."""
    mask = None
    if causal or window is not None:
        at = torch.arange(first_query, first_query + query.shape[0], device=query.device).unsqueeze(1)
        key_at = torch.arange(first_key, first_key + keys.shape[0], device=query.device).unsqueeze(0)
        mask = key_at <= at
        if window is not None:
            mask &= key_at >= at - window
    out = scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0),
        keys.to(query.dtype).transpose(0, 1).unsqueeze(0),
        values.to(query.dtype).transpose(0, 1).unsqueeze(0),
        attn_mask=mask,
        enable_gqa=enable_gqa,
        scale=scaling,
    )
    return out[0].transpose(0, 1)


def run_sdpa_forward_extend(
    self: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    """Prefill of each request over its cached prefix and itself.

    ``query`` ``[T, H, D]``, ``output`` ``[T, H, V]`` written in place, caches ``[rows, Hk, D or V]``. A layer with a
    sliding window reads only rows its window reaches, from the window pool if SGLang keeps one.
    """
    if encoder_lens is not None or is_cross_attn:
        raise NotImplementedError("cross attention is not served by the CPU platform")
    window = sliding_window_size if sliding_window_size is not None and sliding_window_size > -1 else None
    in_window_pool = window is not None and self.use_sliding_window_kv_pool
    begin = 0
    for request, prefix, length in zip(
        req_pool_indices.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True
    ):
        end = begin + length
        first_key = 0 if window is None else max(0, prefix - window)
        rows = _locations(self, req_to_token, request, first_key, prefix + length, in_window_pool)
        output[begin:end] = _attend(
            query[begin:end],
            k_cache[rows],
            v_cache[rows],
            first_query=prefix,
            first_key=first_key,
            causal=causal,
            window=window,
            scaling=scaling,
            enable_gqa=enable_gqa,
        )
        begin = end
    return output


def run_sdpa_forward_decode(
    self: Any,
    query: torch.Tensor,
    output: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    scaling: float | None = None,
    enable_gqa: bool = False,
    causal: bool = False,
    is_cross_attn: bool = False,
    sliding_window_size: int | None = None,
) -> torch.Tensor:
    """One token per request, at position ``seq_lens - 1``; tensors as in :func:`run_sdpa_forward_extend`."""
    if encoder_lens is not None or is_cross_attn:
        raise NotImplementedError("cross attention is not served by the CPU platform")
    window = sliding_window_size if sliding_window_size is not None and sliding_window_size > -1 else None
    in_window_pool = window is not None and self.use_sliding_window_kv_pool
    for n, (request, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        first_key = 0 if window is None else max(0, length - 1 - window)
        rows = _locations(self, req_to_token, request, first_key, length, in_window_pool)
        output[n : n + 1] = _attend(
            query[n : n + 1],
            k_cache[rows],
            v_cache[rows],
            first_query=length - 1,
            first_key=first_key,
            causal=False,
            window=None,
            scaling=scaling,
            enable_gqa=enable_gqa,
        )
    return output
