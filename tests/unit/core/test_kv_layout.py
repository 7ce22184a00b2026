"""KVCache sizes from model configurations."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_prfaas.core.kv_layout import KvLayout, layout_of
from sglang_prfaas.core.table1_models import TABLE1_CONFIGS
from sglang_prfaas.core.units import KIB, MIB, gbps_to_bytes_per_s
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.paper import TABLE3_GBPS, TABLE3_LENGTHS

# bytes for each token, fixed MiB, window bytes for each token; from the architectures, by hand
EXPECTED = {
    "Kimi Linear": (7 * 576 * 2, 20 * (2 + 72 / 1024), 0),
    "MiMo-V2-Flash": (9 * 4 * 320 * 2, 0, 39 * 8 * 320 * 2),
    "Qwen3.5-397B": (15 * 2 * 512 * 2, 45 * (4 + 72 / 1024), 0),
    "Ring-2.5-1T": (10 * 576 * 2, 70 * 4, 0),
    "MiniMax-M2.5": (62 * 8 * 256 * 2, 0, 0),
    "Qwen3-235B": (94 * 4 * 256 * 2, 0, 0),
}


@pytest.mark.parametrize("model", EXPECTED)
def test_layouts_of_table_1(model: str) -> None:
    per_token, state_mib, window = EXPECTED[model]
    layout = layout_of(TABLE1_CONFIGS[model])
    assert layout.full_bytes_per_token == per_token
    assert layout.state_bytes / MIB == pytest.approx(state_mib)
    assert layout.window_bytes_per_token == window


@pytest.mark.parametrize("model", TABLE3_GBPS)
def test_sizes_agree_with_table_3(model: str) -> None:
    """S_kv / Phi_kv is the prefill time (eq. 1): it has to rise with the length, and no faster than its square."""
    layout = layout_of(TABLE1_CONFIGS[model])
    seconds = [
        layout.size_bytes(k * 1000) / gbps_to_bytes_per_s(gbps)
        for k, gbps in zip(TABLE3_LENGTHS, TABLE3_GBPS[model], strict=True)
    ]
    assert 0.2 < seconds[0] < 0.6, "a short prompt costs one pass over the weights"
    for before, after, k_before, k_after in zip(seconds, seconds[1:], TABLE3_LENGTHS, TABLE3_LENGTHS[1:], strict=False):
        assert before < after < before * (k_after / k_before) ** 2


def test_hybrids_emit_far_less_than_dense_models() -> None:
    size = {name: layout_of(config).size_bytes(128_000) for name, config in TABLE1_CONFIGS.items()}
    assert size["MiniMax-M2.5"] / size["Ring-2.5-1T"] > 15
    assert size["Qwen3-235B"] / size["Kimi Linear"] > 20


def test_window_and_increment() -> None:
    layout = KvLayout(full_bytes_per_token=10, window_bytes_per_token=100, window_tokens=8, state_bytes=1000)
    assert layout.size_bytes(4) == 40 + 400 + 1000
    assert layout.size_bytes(100) == 1000 + 800 + 1000
    assert layout.sizes_bytes(np.array([4.0, 100.0])).tolist() == [1440, 2800]
    assert layout.increment_bytes(100, 60) == 400 + 800 + 1000, "window and state always move"
    assert layout.increment_bytes(100, 200) == 1800


def test_kimi_k2_like_sizes_of_the_paper() -> None:
    """15 MLA layers of 576 values in bf16 are the 16.875 KiB for each token that fit Table 5."""
    config = {"num_hidden_layers": 15, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert layout_of(config).full_bytes_per_token == 16.875 * KIB


def test_nested_text_config_and_layer_types() -> None:
    inner = {**TABLE1_CONFIGS["Qwen3.5-397B"], "layer_types": ["linear_attention", "full_attention"] * 30}
    assert layout_of({"text_config": inner}).full_bytes_per_token == 30 * 2 * 512 * 2


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match="kv_lora_rank must be a whole number, got None"):
        layout_of({"num_hidden_layers": 2, "kv_lora_rank": None, "qk_rope_head_dim": 64})
