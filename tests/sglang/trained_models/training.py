"""Training of a tiny model on the language, in a minute or two of one core."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from .delta_rule import chunk_kda
from .language import BLOCK_TOKENS, batch, prompt
from .starts import start


class Recipe(NamedTuple):
    """How long a family is trained, and the highest rate of its matrices."""

    steps: int
    rate: float


SEED = 7
BATCH_TOKENS = 768
BLOCKS = (1, 2, 3, 4, 6, 9, 12)
"""Blocks of a text, from the first steps to the last: the longest prompts of the tests are as long."""
RECIPES = {"qwen3": Recipe(steps=120, rate=0.01), "kimi-linear": Recipe(steps=180, rate=0.015)}
LEAST_RIGHT = 0.9
"""Share of the answers that are right after a training that succeeded."""
OTHER_RATE = 0.003
"""Of what is looked up, and of vectors."""
WARM_UP_STEPS = 5
ANSWER_TOKENS = 16


class Score(NamedTuple):
    """Of prompts that training has not seen: how many answers are right as a whole, and by how much the logit of a
    right token is above the next best, for the worst hundredth and the middle of them."""

    right: float
    margin_worst: float
    margin_median: float


def model_of(directory: Path) -> Any:
    """The model that a directory's `config.json` says, with weights that mean nothing yet."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.kimi_linear import modeling_kimi_linear

    modeling_kimi_linear.chunk_kimi_delta_attention = chunk_kda
    config = AutoConfig.from_pretrained(directory)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def train(family: str, directory: Path, report: Callable[[str], None]) -> Any:
    """Train the model of `directory`, the same each time, and return it; every 20 steps a line goes to `report`."""
    generator = torch.Generator().manual_seed(SEED)
    torch.manual_seed(SEED)
    model = model_of(directory)
    start(model, family, generator)
    steps, rate = RECIPES[family]
    optimizers = _optimizers(model, rate)
    for step in range(steps):
        blocks = BLOCKS[step * len(BLOCKS) // steps]
        rows = max(1, BATCH_TOKENS // (2 * blocks * BLOCK_TOKENS))
        ids, known = batch(generator, rows, blocks)
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=known - 1).logits
        loss = cross_entropy(logits.flatten(0, 1), ids[:, known].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        slow = min((step + 1) / WARM_UP_STEPS, 1.0) * max(0.05, math.cos(math.pi / 2 * step / steps))
        for optimizer, highest in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = highest * slow
            optimizer.step()
        model.zero_grad()
        if step % 20 == 0:
            report(f"step {step} of {steps}: loss {loss.item():.3f}")
    return model.eval()


def _optimizers(model: Any, rate: float) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices, AdamW for what is looked up and for vectors."""
    looked_up = ("embed_tokens", "lm_head", "gate.weight")
    matrices, others = [], []
    for name, weight in model.named_parameters():
        (matrices if weight.dim() == 2 and not any(part in name for part in looked_up) else others).append(weight)
    muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw", ns_steps=3)
    return [(muon, rate), (torch.optim.AdamW(others, lr=OTHER_RATE, weight_decay=0.0), OTHER_RATE)]


def score(model: Any, prompts: int = 50) -> Score:
    """How well a model answers, each token after the right ones before it."""
    source = random.Random(SEED)
    right, margins = 0, []
    with torch.no_grad():
        for _ in range(prompts):
            asked, answer = prompt(source, source.randint(20, 192), ANSWER_TOKENS)
            logits = model(input_ids=torch.tensor([asked + answer[:-1]]), use_cache=False).logits[0, -ANSWER_TOKENS:]
            wanted = torch.tensor(answer).unsqueeze(1)
            chosen = logits.gather(1, wanted)
            best_other = logits.scatter(1, wanted, -torch.inf).amax(1, keepdim=True)
            margins.append((chosen - best_other).squeeze(1))
            right += bool((chosen > best_other).all())
    found = torch.cat(margins)
    return Score(right / prompts, found.quantile(0.01).item(), found.median().item())
