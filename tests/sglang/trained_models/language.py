"""The language of the trained models: a text of tokens in any order, one of them again, and then what followed it.

Each token of an answer stands anywhere in the prompt, behind the only other place of the token before it. So an answer
is right only where attention finds every one of those places."""

from __future__ import annotations

import random

import torch

FIRST_TOKEN, LAST_TOKEN = 10, 499
BLOCK_TOKENS = 16
"""Tokens in a row that a training text repeats."""


def prompt(source: random.Random, text_tokens: int, answer_tokens: int) -> tuple[list[int], list[int]]:
    """A prompt of `text_tokens` tokens and one of them again, and its right answer. Raises ValueError where the text is
    not longer than the answer."""
    text = source.sample(range(FIRST_TOKEN, LAST_TOKEN + 1), text_tokens)
    at = source.randrange(text_tokens - answer_tokens)
    return [*text, text[at]], text[at + 1 : at + 1 + answer_tokens]


def batch(generator: torch.Generator, rows: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[rows, T]` of texts that come again with their blocks in another order, and the places `[P]` of tokens
    that can be known: those of the second time but for the first of each block."""
    noise = torch.rand(rows, LAST_TOKEN + 1 - FIRST_TOKEN, generator=generator)
    text = noise.argsort(1)[:, : blocks * BLOCK_TOKENS] + FIRST_TOKEN
    order = torch.rand(rows, blocks, generator=generator).argsort(1).unsqueeze(-1).expand(-1, -1, BLOCK_TOKENS)
    again = text.unflatten(1, (blocks, BLOCK_TOKENS)).gather(1, order).flatten(1)
    places = torch.arange(text.shape[1], 2 * text.shape[1])
    return torch.cat((text, again), 1), places[places % BLOCK_TOKENS != 0]
