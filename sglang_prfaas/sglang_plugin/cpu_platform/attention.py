"""Full and sliding-window attention for SGLang's ``torch_native`` backend: bodies of two of its methods."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

QUERY_BLOCK = 512  # Queries at a time: keys behind a block are not read, and its scores stay small.


class _Rule(NamedTuple):
    """How a layer attends: ``window`` counts the tokens before the query that it sees (None: all)."""

    scaling: float
    causal: bool
    window: int | None
    sinks: torch.Tensor | None


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, *, first_query: int, first_key: int, rule: _Rule
) -> torch.Tensor:
    """``query`` ``[Tq, H, D]`` at positions from ``first_query``, keys ``[Tk, Hk, D]`` from ``first_key``."""
    mask = None
    if rule.causal and query.shape[0] > 1:
        at = torch.arange(first_query, first_query + query.shape[0], device=query.device).unsqueeze(1)
        key_at = torch.arange(first_key, first_key + keys.shape[0], device=query.device).unsqueeze(0)
        mask = key_at <= at
        if rule.window is not None:
            mask &= key_at >= at - rule.window
    q, k, v = (x.to(query.dtype).transpose(0, 1) for x in (query, keys, values))
    if rule.sinks is not None:
        return _attend_with_sinks(q, k, v, mask, rule.scaling, rule.sinks).transpose(0, 1)
    out = scaled_dot_product_attention(
        q.unsqueeze(0),
        k.unsqueeze(0),
        v.unsqueeze(0),
        attn_mask=mask,
        enable_gqa=q.shape[0] != k.shape[0],
        scale=rule.scaling,
    )
    return out[0].transpose(0, 1)


def _attend_with_sinks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Softmax with one more logit per head, ``sinks`` ``[H]``, that takes weight and gives no value."""
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    scores = (q.float() @ k.float().mT) * scaling
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    sink = sinks.float().view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    weights = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    return (weights @ v.float()).to(q.dtype)


def _run(
    backend: Any, layer: Any, forward_batch: Any, q: torch.Tensor, sinks: torch.Tensor | None, lengths: list[int]
) -> torch.Tensor:
    """Attention of ``lengths[n]`` new tokens per request, the last of their sequences, over all that is cached.

    A layer with a sliding window reads only what its window reaches, and from the window pool if there is one.
    """
    if layer.is_cross_attention:
        raise NotImplementedError("cross attention is not served by the CPU platform")
    window = layer.sliding_window_size if layer.sliding_window_size is not None else -1
    rule = _Rule(
        scaling=layer.scaling,
        causal=layer.attn_type.name != "ENCODER_ONLY",
        window=window if window > -1 else None,
        sinks=sinks,
    )
    query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
    output = query.new_zeros(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
    k_cache = backend.token_to_kv_pool.get_key_buffer(layer.layer_id)
    v_cache = backend.token_to_kv_pool.get_value_buffer(layer.layer_id)
    req_to_token = backend.req_to_token_pool.req_to_token
    begin = 0
    for request, total, length in zip(
        forward_batch.req_pool_indices.tolist(), forward_batch.seq_lens.tolist(), lengths, strict=True
    ):
        end, prefix = begin + length, total - length
        first_key = 0 if rule.window is None else max(0, prefix - rule.window)
        rows = req_to_token[request, first_key:total].long()
        if rule.window is not None and backend.use_sliding_window_kv_pool:
            rows = backend.token_to_kv_pool.translate_loc_from_full_to_swa(rows).long()
        keys, values = k_cache[rows], v_cache[rows]
        for low in range(0, length, QUERY_BLOCK):
            high = min(low + QUERY_BLOCK, length)
            reach = first_key if rule.window is None else max(first_key, prefix + low - rule.window)
            seen = slice(reach - first_key, (prefix + high if rule.causal else total) - first_key)
            output[begin + low : begin + high] = _attend(
                query[begin + low : begin + high],
                keys[seen],
                values[seen],
                first_query=prefix + low,
                first_key=reach,
                rule=rule,
            )
        begin = end
    return output.view(q.shape[0], -1)


def _store(backend: Any, layer: Any, forward_batch: Any, k: torch.Tensor | None, v: torch.Tensor | None) -> None:
    from sglang.srt.mem_cache.memory_pool import KVWriteLoc

    if k is not None and v is not None:
        where = KVWriteLoc(forward_batch.out_cache_loc, backend.swa_out_cache_loc)
        backend.token_to_kv_pool.set_kv_buffer(layer, where, k, v)


def forward_extend(
    self: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Prefill. ``q`` ``[T, H*D]``, ``k`` ``[T, Hk, D]``, ``v`` ``[T, Hk, V]``, ``sinks`` ``[H]``; to ``[T, H*V]``."""
    if save_kv_cache:
        _store(self, layer, forward_batch, k, v)
    return _run(self, layer, forward_batch, q, sinks, forward_batch.extend_seq_lens.tolist())


def forward_decode(
    self: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    forward_batch: Any,
    save_kv_cache: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One token per request; tensors as in :func:`forward_extend` with T requests."""
    if save_kv_cache:
        _store(self, layer, forward_batch, k, v)
    q = q.reshape(-1, layer.tp_q_head_num * layer.qk_head_dim)
    return _run(self, layer, forward_batch, q, sinks, [1] * q.shape[0])
