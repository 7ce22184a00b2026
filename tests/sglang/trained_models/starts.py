"""Where training starts: random weights, in which one head of attention leans to what copying needs.

Copying takes two steps (Olsson et al. 2022, "In-context learning and induction heads"): each place must know the token
before it, and a head must look for the place whose token before is the one at hand. From weights without any order
nothing of this was learnt in the time that tests may take; from these it is learnt in seconds. What the start gives is
rough: margins come from training, of all weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

EMBEDDING_WIDTH = 128
POSITION_PAIRS = 6
"""Pairs of elements of a head, of the fastest rotation, that tell one place from the next."""
QK_NORM = 1.7
SHARPNESS = 4.0
"""How large the queries of MLA are beside its keys."""


class Directions:
    """Random orthonormal directions of the residual stream, `[128, 128]` each: `key`, where the token before is
    written to, `before`, how, and `answer`, which the vocabulary's head reads."""

    def __init__(self, generator: torch.Generator) -> None:
        def rotation() -> torch.Tensor:
            found = torch.linalg.qr(torch.randn(EMBEDDING_WIDTH, EMBEDDING_WIDTH, generator=generator))
            return found.Q

        self.key, self.before, self.answer, self.value = (rotation() for _ in range(4))


def start(model: Any, family: str, generator: torch.Generator) -> None:
    """Write a model's first weights, the same for the same generator."""
    embedding = torch.randn(model.config.vocab_size, EMBEDDING_WIDTH, generator=generator)
    embedding[:, 0] = 1.0  # what all tokens have in common: attention by position alone needs it
    directions = Directions(generator)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "conv" not in name and "A_log" not in name:
                noise = torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5
                weight.copy_(noise * (0.3 if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")) else 1))
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(embedding @ directions.answer.T / EMBEDDING_WIDTH**0.5)
        _STARTS[family](model, directions)


def _qwen3(model: Any, directions: Directions) -> None:
    """GQA, two heads for each of keys and values. The first layer looks one place back, the second for a token:
    with the slow half of the rotated pairs, which turn little over a few hundred places."""
    width = model.config.head_dim
    angle = model.config.rope_parameters["rope_theta"] ** (-torch.arange(width // 2) / (width // 2))
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    back = torch.zeros(2, width)
    back[0, :POSITION_PAIRS] = 1.0
    back[1, :POSITION_PAIRS] = angle[:POSITION_PAIRS].cos()
    back[1, width // 2 : width // 2 + POSITION_PAIRS] = angle[:POSITION_PAIRS].sin()
    first.q_proj.weight.zero_()
    first.k_proj.weight.zero_()
    first.q_proj.weight[:, 0] = back[0].repeat(model.config.num_attention_heads)
    first.k_proj.weight[:, 0] = back[1].repeat(model.config.num_key_value_heads)
    first.v_proj.weight.copy_(directions.before)
    first.o_proj.weight.copy_(_heads_out(directions.key, groups=2, width=width))
    slow = torch.cat((torch.arange(width // 4, width // 2), torch.arange(3 * width // 4, width)))
    second.q_proj.weight.zero_()
    second.k_proj.weight.zero_()
    for head in range(model.config.num_attention_heads):
        kv = head // 2
        part = slice(kv * len(slow), (kv + 1) * len(slow))
        second.q_proj.weight[head * width + slow] = directions.before[part]
        second.k_proj.weight[kv * width + slow] = directions.key.T[part]
    second.v_proj.weight.copy_(directions.value)
    second.o_proj.weight.copy_(_heads_out(directions.answer @ directions.value.T, groups=2, width=width))
    for attention in (layer.self_attn for layer in model.model.layers):
        attention.q_norm.weight.fill_(QK_NORM)
        attention.k_norm.weight.fill_(QK_NORM)


def _heads_out(weight: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """`[N, H D]` as an output projection of H heads of values to one of `groups` H query heads that share them."""
    return weight.unflatten(1, (-1, 1, width)).expand(-1, -1, groups, -1).flatten(1) / groups


def _kimi_linear(model: Any, directions: Directions) -> None:
    """KDA and MLA. The first layer forgets at once, and its convolution gives it the value of the token before; MLA
    looks for a token with the part of its latents that keeps it, and with the keys that all heads share."""
    first, last = (model.model.layers[index].self_attn for index in (0, -1))
    first.q_proj.weight.copy_(first.k_proj.weight)
    first.v_proj.weight.copy_(0.3 * directions.before)  # where SiLU is almost straight
    first.o_proj.weight.copy_(2.0 * directions.key)
    first.g_b_proj.weight.mul_(0.1)
    first.forget_gate.A_log.fill_(2.0)
    first.forget_gate.dt_bias.fill_(2.0)
    taps = first.conv1d.weight.zero_().unflatten(0, (3, -1))
    taps[:2, ..., -1] = 1.0
    taps[2, ..., -2] = 1.0
    config = model.config
    nope, rope, value, latent = (
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
        config.kv_lora_rank,
    )
    kept = latent - value
    last.kv_a_proj_with_mqa.weight[:kept] = directions.key.T[:kept]
    last.kv_a_proj_with_mqa.weight[kept:latent] = directions.value[:value]
    last.kv_a_proj_with_mqa.weight[latent:] = directions.key.T[kept : kept + rope]
    keys_values = torch.zeros(config.num_attention_heads, nope + value, latent)
    keys_values[:, :nope, :kept] = torch.eye(nope, kept)
    keys_values[:, nope:, kept:] = torch.eye(value)
    last.kv_b_proj.weight.copy_(keys_values.flatten(0, 1))
    last.q_proj.weight.copy_(SHARPNESS * directions.before[: nope + rope].repeat(config.num_attention_heads, 1))
    out = directions.answer @ directions.value.T[:, :value]
    last.o_proj.weight.copy_(out.repeat(1, config.num_attention_heads) / config.num_attention_heads)


_STARTS: Mapping[str, Callable[[Any, Directions], None]] = {"qwen3": _qwen3, "kimi-linear": _kimi_linear}
FAMILIES = tuple(_STARTS)
