"""LoRA adapters in a real server with a prefix cache: what one computed is of no use to another, nor to no adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sglang_prfaas.tiny_models import make_tiny_model

from .driving import wait_for
from .store_server import OUTPUT_TOKENS, PAGE_TOKENS, StoreServer, prompt

pytestmark = pytest.mark.sglang

RANK = 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def make_adapter(directory: Path, model: Path, seed: int) -> Path:
    """A LoRA adapter in PEFT's format with random weights, large enough to change what is generated."""
    config = json.loads((model / "config.json").read_bytes())
    hidden, head = config["hidden_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes = {"q_proj": (hidden, query), "k_proj": (hidden, key), "v_proj": (hidden, key), "o_proj": (query, hidden)}
    source = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, rows, generator=source)
            weights[f"{at}.lora_B.weight"] = torch.randn(columns, RANK, generator=source)
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def test_adapters_share_no_prefix(tmp_path: Path) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model")
    adapters = {name: make_adapter(tmp_path / name, model, seed) for seed, name in enumerate(("red", "blue"))}
    args = ["--enable-lora", "--lora-backend", "torch_native", "--max-lora-rank", str(RANK)]
    args += ["--lora-target-modules", *TARGETS, "--lora-paths", *(f"{name}={path}" for name, path in adapters.items())]
    server = StoreServer("qwen3", tmp_path, host_bytes=8 << 20, args=args)
    asked = prompt(1, 280)
    pages = (len(asked) + OUTPUT_TOKENS - 1) // PAGE_TOKENS
    reusable = (len(asked) - 1) // PAGE_TOKENS * PAGE_TOKENS
    with server.running("lora"):
        computed = {}
        for count, adapter in enumerate((None, "red", "blue"), 1):
            tokens, cached, _ = server.ask(asked, lora_path=adapter)
            assert cached == 0, f"{adapter} found what another computed"
            computed[adapter] = tokens
            wait_for(f"the pages of {adapter}", lambda: len(server.component("kv")) >= count * pages)  # noqa: B023
            server.flush()
        assert len({tuple(tokens) for tokens in computed.values()}) == 3, "adapters must show, or this shows nothing"
        for adapter, tokens in computed.items():
            again, cached, stored = server.ask(asked, lora_path=adapter)
            assert (again, cached, stored) == (tokens, reusable, reusable)
            server.flush()
