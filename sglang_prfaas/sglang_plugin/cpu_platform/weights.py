"""Random weights that make a tiny model answer sharply and from its whole prefix.

A tensor depends on its name and whole shape alone, so every process and every server of a model has the same weights,
whatever its tensor-parallel width: a rank takes its part of the whole.
"""

from __future__ import annotations

import hashlib
import re

import torch

from sglang_prfaas.sglang_plugin.cpu_platform.weight_shards import division, part_of, whole_shape
from sglang_prfaas.tiny_models.vocabulary import silent_tokens

# Gain of a weight over 1/sqrt(fan in), by the name of its parameter; the first match counts.
GAINS: tuple[tuple[str, float], ...] = (
    (r"lm_head", 6.0),  # logits of variance 36: top-1 margins far above rounding noise
    (r"(gate|router)\.weight$", 2.0),  # experts well apart
    (r"\.(q_proj|q_b_proj)\.weight$", 2.9),  # attention that picks tokens: logits of variance 8
    (r"attn\.qkv_proj\.weight$", 1.7),  # the same, from queries and keys
    (r"(o_proj|out_proj|dense)\.weight$", 3.0),  # attention's share of the residual stream
)
NORM_SPREAD = 0.1
QK_NORM = 1.7  # logits of variance 8 where queries and keys are normalised
EMBEDDING_SCALE = 0.5


def seed_of(name: str) -> int:
    """A 63-bit seed from a parameter's name, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def _normal(name: str, shape: torch.Size) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(name)))


def draw(name: str, shape: torch.Size, *, gemma_norm: bool = False) -> torch.Tensor:
    """Float32 values for the parameter ``name``; ``gemma_norm`` if its layer multiplies by ``1 + weight``."""
    noise = _normal(name, shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        return -4.0 + noise
    if leaf == "dt_bias":
        return 0.5 * noise
    if leaf in ("e_score_correction_bias", "expert_bias"):
        return 0.01 * noise
    if leaf == "sinks":
        return noise
    if leaf.endswith("bias"):
        return 0.02 * noise
    if "conv1d" in name or "conv_weight" in name:
        return noise / shape[-1] ** 0.5
    if "embed_tokens" in name or "word_embeddings" in name:
        return EMBEDDING_SCALE * noise
    if len(shape) <= 1 or "norm" in name.rsplit(".", 2)[-2]:
        mean = QK_NORM if re.search(r"\.(q_norm|k_norm|query_layernorm|key_layernorm)\.", name) else 1.0
        return (mean - 1.0 if gemma_norm else mean) + NORM_SPREAD * noise
    if "lm_head" in name:
        noise[[token for token in silent_tokens() if token < shape[0]]] = 0.0
    gain = next((gain for pattern, gain in GAINS if re.search(pattern, name)), 1.0)
    return gain * noise / shape[-1] ** 0.5


def initialize_dummy_weights(model: torch.nn.Module, low: float = -1e-3, high: float = 1e-3, seed: int = 1234) -> None:
    """Fill every floating-point parameter of ``model``; ``low``, ``high`` and ``seed`` of the original are not used."""
    from sglang.srt.runtime_context import get_parallel

    width, rank = int(get_parallel().tp_size), int(get_parallel().tp_rank)
    for prefix, module in model.named_modules():
        gemma_norm = "Gemma" in type(module).__name__ and "Norm" in type(module).__name__
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                shape = parameter.shape
                divided = division(module, leaf, shape, width) if width > 1 else None
                whole = draw(f"{prefix}.{leaf}", whole_shape(shape, divided), gemma_norm=gemma_norm)
                parameter.data.copy_(part_of(whole, divided, width, rank))
