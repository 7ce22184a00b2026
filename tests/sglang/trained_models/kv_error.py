"""What a codec does to the KVCache of a trained model."""

from __future__ import annotations

import random
from typing import Any

import torch

from sglang_prfaas.transport.codec.quantised import Quantised

from .language import prompt

DTYPE = "bfloat16"


def items(model: Any, prompts: int, seed: int) -> list[torch.Tensor]:
    """Full-attention KVCache as the wire has it, `[T, elements]` bfloat16 of each buffer: latents and shared keys of
    MLA in one, keys and values of GQA each in its own."""
    source = random.Random(seed)
    found = []
    for _ in range(prompts):
        asked, _ = prompt(source, source.randint(20, 192), 16)
        with torch.no_grad():
            cache = model(input_ids=torch.tensor([asked]), use_cache=True).past_key_values
        for layer in cache.layers:
            if getattr(layer, "keys", None) is None:
                continue  # recurrent state
            parts = [part[0].transpose(0, 1).flatten(1) for part in (layer.keys, layer.values)]
            found += [torch.cat(parts, 1)] if hasattr(model.config, "kv_lora_rank") else parts
    return [item.to(torch.bfloat16).contiguous() for item in found]


def relative_l2(code: str, buffers: list[torch.Tensor]) -> float:
    """Relative L2 error of all `buffers` after a codec."""
    error = whole = 0.0
    for buffer in buffers:
        raw = buffer.view(torch.uint8).numpy()
        codec = Quantised(code, DTYPE, raw.shape[1])
        payload = codec.encode(raw)
        out = torch.empty_like(buffer)
        assert payload is not None
        codec.decode(payload, out.view(torch.uint8).numpy())
        error += (out.float() - buffer.float()).square().sum().item()
        whole += buffer.float().square().sum().item()
    return (error / whole) ** 0.5
