"""Tiny LoRA adapters: files as PEFT writes them, that fit the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_prfaas.tiny_models import adapter_args, make_tiny_adapter, make_tiny_model

safetensors = pytest.importorskip("safetensors.torch")


def test_an_adapter_fits_the_model(tmp_path: Path) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model")
    adapter = make_tiny_adapter(tmp_path / "adapters" / "red", model, seed=1)
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    weights = safetensors.load_file(adapter / "adapter_model.safetensors")
    layers = json.loads((model / "config.json").read_bytes())["num_hidden_layers"]
    assert len(weights) == layers * len(config["target_modules"]) * 2
    at = "base_model.model.model.layers.0.self_attn."
    assert weights[f"{at}k_proj.lora_A.weight"].shape == (config["r"], 128)
    assert weights[f"{at}k_proj.lora_B.weight"].shape == (2 * 64, config["r"])
    assert weights[f"{at}o_proj.lora_A.weight"].shape == (config["r"], 4 * 64)


def test_seeds_make_adapters_and_the_same_seed_the_same_one(tmp_path: Path) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model")
    made = [make_tiny_adapter(tmp_path / name, model, seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    first, again, other = [(adapter / "adapter_model.safetensors").read_bytes() for adapter in made]
    assert first == again
    assert first != other
    with pytest.raises(FileExistsError):
        make_tiny_adapter(tmp_path / "a", model, 3)


def test_arguments_name_every_adapter() -> None:
    args = adapter_args({"red": Path("/a"), "blue": Path("/b")})
    assert args[-3:] == ["--lora-paths", "red=/a", "blue=/b"]
