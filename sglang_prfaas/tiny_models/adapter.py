"""LoRA adapters for tiny models, as PEFT writes them; nothing is trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RANK = 4
_GAIN = 1.5
Shapes = dict[str, tuple[int, int]]
"""Rows and columns of projections of attention, by name."""


def make_tiny_adapter(directory: Path, model: Path, seed: int) -> Path:
    """Write an adapter for a tiny model in `model` to `directory`, and return that, absolute. Rank 4, on the
    projections of attention that SGLang 0.5.23 can adapt (docs/cpu_platform.md), with random weights of `seed` that
    change answers, and what later layers keep of the prompt. Raises OSError where the directory cannot be made or is
    there already, ValueError for a family that was not tried."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_bytes())
    shapes = _shapes(config)
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in _layers(config):
        for name, (rows, columns) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, rows, generator=source) / rows**0.5
            weights[f"{at}.lora_B.weight"] = _GAIN * torch.randn(columns, RANK, generator=source) / RANK**0.5
    directory = directory.absolute()
    directory.mkdir(parents=True)
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(shapes), "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return directory


def adapter_args(adapters: dict[str, Path]) -> list[str]:
    """SGLang arguments that serve adapters, by name, beside a tiny model on a CPU."""
    paths = [f"{name}={path}" for name, path in adapters.items()]
    return ["--enable-lora", "--lora-backend", "torch_native", "--lora-paths", *paths]


def _shapes(config: Mapping[str, Any]) -> Shapes:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    query = heads * config["head_dim"]
    match config["model_type"]:
        case "qwen3":
            key = config["num_key_value_heads"] * config["head_dim"]
            inward = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key)}
            return {**inward, "o_proj": (query, hidden)}
        case "kimi_linear":  # the same in KDA layers
            return {"o_proj": (heads * config["v_head_dim"], hidden)}
        case "qwen3_next":
            return {"o_proj": (query, hidden)}
        case other:
            raise ValueError(f"no adapters for tiny models of type {other}; choose qwen3, kimi-linear or qwen3-next")


def _layers(config: Mapping[str, Any]) -> range:
    """Those that have the projections."""
    every = config.get("full_attention_interval", 1)
    return range(every - 1, config["num_hidden_layers"], every)
