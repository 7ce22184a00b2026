"""LoRA adapters for the tiny dense model, as PEFT writes them; nothing is trained."""

from __future__ import annotations

import json
from pathlib import Path

RANK = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GAIN = 1.5


def make_tiny_adapter(directory: Path, model: Path, seed: int) -> Path:
    """Write an adapter for a tiny `qwen3` in `model` to `directory`, and return that, absolute. Rank 4, on the
    projections of attention, with random weights of `seed` that change keys, values and answers. Raises OSError where
    the directory cannot be made or is there already."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_bytes())
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden)}
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name in TARGETS:
            rows, columns = shapes[name]
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, rows, generator=source) / rows**0.5
            weights[f"{at}.lora_B.weight"] = _GAIN * torch.randn(columns, RANK, generator=source) / RANK**0.5
    directory = directory.absolute()
    directory.mkdir(parents=True)
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(TARGETS), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return directory


def adapter_args(adapters: dict[str, Path]) -> list[str]:
    """SGLang arguments that serve adapters, by name, beside a tiny model on a CPU."""
    paths = [f"{name}={path}" for name, path in adapters.items()]
    return ["--enable-lora", "--lora-backend", "torch_native", "--lora-paths", *paths]
