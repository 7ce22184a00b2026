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


@pytest.mark.parametrize(
    ("family", "layers", "rows"), [("kimi-linear", [0, 1, 2, 3], 4 * 32), ("qwen3-next", [3], 4 * 64)]
)
def test_hybrid_models_have_adapters_on_what_sglang_adapts(
    tmp_path: Path, family: str, layers: list[int], rows: int
) -> None:
    adapter = make_tiny_adapter(tmp_path / "red", make_tiny_model(family, tmp_path / "model"), seed=1)
    weights = safetensors.load_file(adapter / "adapter_model.safetensors")
    at = "base_model.model.model.layers."
    names = [f"{at}{layer}.self_attn.o_proj.lora_{part}.weight" for layer in layers for part in "AB"]
    assert sorted(weights) == names
    assert weights[f"{at}3.self_attn.o_proj.lora_A.weight"].shape == (4, rows)
    assert weights[f"{at}3.self_attn.o_proj.lora_B.weight"].shape == (128, 4)


def test_other_families_have_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters for tiny models of type"):
        make_tiny_adapter(tmp_path / "red", make_tiny_model("swa", tmp_path / "model"), seed=1)


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
