"""KVCache size of a request from its model's layout: S_kv(l) of the paper (notation of section 3.4).

Full-attention layers keep bytes for every token, sliding-window layers for the last tokens of their window, linear
layers a recurrent state of fixed size, and the inputs that their short convolution still needs.

`layout_of` reads the fields of a Hugging Face config.json, for the families of the paper's Table 1 and those that
share their field names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from sglang_prfaas.errors import ConfigError

KV_BYTES = 2  # bf16
STATE_BYTES = 4  # recurrent state is kept in float32
CONV_BYTES = 2


class KvLayout(Struct, frozen=True, kw_only=True):
    """Bytes that one request's KVCache takes, over all ranks."""

    full_bytes_per_token: float
    """All full-attention layers together."""
    window_bytes_per_token: float = 0.0
    """All sliding-window layers together, for tokens in the window."""
    window_tokens: int = 0
    state_bytes: float = 0.0
    """Recurrent and convolution state of all linear layers; independent of the length."""

    def size_bytes(self, tokens: float) -> float:
        """S_kv(l) in bytes."""
        window = self.window_bytes_per_token * min(tokens, self.window_tokens)
        return self.full_bytes_per_token * tokens + window + self.state_bytes

    def sizes_bytes(self, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """S_kv(l) of every element; [N] -> [N]."""
        window = self.window_bytes_per_token * np.minimum(tokens, self.window_tokens)
        return np.asarray(self.full_bytes_per_token * tokens + window + self.state_bytes, dtype=np.float64)

    def increment_bytes(self, tokens: float, held_tokens: float) -> float:
        """What has to move where the receiver holds full-attention blocks of the first `held_tokens` already.

        State and window belong to the end of the prompt: they always move.
        """
        return self.size_bytes(tokens) - self.full_bytes_per_token * min(held_tokens, tokens)


def layout_of(config: Mapping[str, Any]) -> KvLayout:
    """The layout of a model from the fields of its config.json; caches in bf16, recurrent state in float32.

    Raises ConfigError where the fields do not say which layers keep what.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        config = inner
    layers = _number(config, "num_hidden_layers")
    if "linear_attn_config" in config:
        return _kimi_linear(config)
    if "hybrid_layer_pattern" in config:
        return _sliding_window(config)
    if "layer_group_size" in config:
        linear = sum((index + 1) % _number(config, "layer_group_size") != 0 for index in range(layers))
        heads = _number(config, "num_attention_heads")
        state = heads * _number(config, "head_dim") ** 2 * STATE_BYTES
        return KvLayout(full_bytes_per_token=_mla(config) * (layers - linear), state_bytes=float(linear * state))
    if "linear_num_value_heads" in config:
        return _gated_delta_net(config)
    per_layer = _mla(config) if "kv_lora_rank" in config else _gqa(config)
    return KvLayout(full_bytes_per_token=per_layer * layers)


def _kimi_linear(config: Mapping[str, Any]) -> KvLayout:
    """KDA layers beside MLA layers (Kimi Linear)."""
    linear = config["linear_attn_config"]
    heads, dim = _number(linear, "num_heads"), _number(linear, "head_dim")
    conv = 3 * heads * dim * (_number(linear, "short_conv_kernel_size") - 1) * CONV_BYTES
    state = heads * dim * dim * STATE_BYTES + conv
    return KvLayout(
        full_bytes_per_token=_mla(config) * len(linear["full_attn_layers"]),
        state_bytes=float(len(linear["kda_layers"]) * state),
    )


def _gated_delta_net(config: Mapping[str, Any]) -> KvLayout:
    """Gated DeltaNet layers beside GQA layers (Qwen3-Next, Qwen3.5)."""
    layers = _number(config, "num_hidden_layers")
    types = config.get("layer_types")
    full = types.count("full_attention") if types else layers // _number(config, "full_attention_interval")
    value_heads, value_dim = _number(config, "linear_num_value_heads"), _number(config, "linear_value_head_dim")
    key_heads, key_dim = _number(config, "linear_num_key_heads"), _number(config, "linear_key_head_dim")
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    conv = channels * (_number(config, "linear_conv_kernel_dim") - 1) * CONV_BYTES
    state = value_heads * key_dim * value_dim * STATE_BYTES + conv
    return KvLayout(full_bytes_per_token=_gqa(config) * full, state_bytes=float((layers - full) * state))


def _sliding_window(config: Mapping[str, Any]) -> KvLayout:
    """Sliding-window layers (1 in the pattern) beside GQA layers (0), with head sizes of their own (MiMo-V2-Flash)."""
    pattern = list(config["hybrid_layer_pattern"])
    dim = _number(config, "swa_head_dim") + _number(config, "swa_v_head_dim")
    per_token = _number(config, "swa_num_key_value_heads") * dim * KV_BYTES
    return KvLayout(
        full_bytes_per_token=_gqa(config) * pattern.count(0),
        window_bytes_per_token=float(per_token * pattern.count(1)),
        window_tokens=_number(config, "sliding_window"),
    )


def _mla(config: Mapping[str, Any]) -> float:
    """Bytes for each token of one MLA layer: the latent vector and the rotary key."""
    return float((_number(config, "kv_lora_rank") + _number(config, "qk_rope_head_dim")) * KV_BYTES)


def _gqa(config: Mapping[str, Any]) -> float:
    """Bytes for each token of one GQA layer: keys and values of every KV head."""
    heads = _number(config, "num_attention_heads")
    dim = config.get("head_dim") or _number(config, "hidden_size") // heads
    value_dim = config.get("v_head_dim") or dim
    return float((config.get("num_key_value_heads") or heads) * (dim + value_dim) * KV_BYTES)


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ConfigError(f"model config: {key} must be a whole number, got {value!r}")
    return value
