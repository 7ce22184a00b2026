"""The fields of the public config.json files that decide the KVCache size of the models in PrfaaS Table 1."""

from __future__ import annotations

from typing import Any

KIMI_LINEAR: dict[str, Any] = {
    "num_hidden_layers": 27,
    "num_attention_heads": 32,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "kda_layers": [layer for layer in range(1, 27) if layer % 4],
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
}

MIMO_V2_FLASH: dict[str, Any] = {
    "num_hidden_layers": 48,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 192,
    "v_head_dim": 128,
    "swa_num_key_value_heads": 8,
    "swa_head_dim": 192,
    "swa_v_head_dim": 128,
    "sliding_window": 128,
    "hybrid_layer_pattern": [0, 1, 1, 1, 1, *([0, 1, 1, 1, 1, 1] * 7), 0],
}

QWEN3_5_397B: dict[str, Any] = {
    "num_hidden_layers": 60,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_value_heads": 64,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}

RING_2_5_1T: dict[str, Any] = {
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "head_dim": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "layer_group_size": 8,
}

MINIMAX_M2_5: dict[str, Any] = {
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
}

QWEN3_235B: dict[str, Any] = {
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
}

TABLE1_CONFIGS: dict[str, dict[str, Any]] = {
    "Kimi Linear": KIMI_LINEAR,
    "MiMo-V2-Flash": MIMO_V2_FLASH,
    "Qwen3.5-397B": QWEN3_5_397B,
    "Ring-2.5-1T": RING_2_5_1T,
    "MiniMax-M2.5": MINIMAX_M2_5,
    "Qwen3-235B": QWEN3_235B,
}
