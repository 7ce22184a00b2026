"""What the training of tiny models stands on; the trained models themselves are asked in `test_codecs.py`."""

from __future__ import annotations

import random

import pytest
import torch
from prfaas_kernels.kda.naive import recurrent_kda

from .trained_models.delta_rule import chunk_kda
from .trained_models.language import BLOCK_TOKENS, batch, prompt


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
def test_kda_is_the_recurrence(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    q, k, v, g = (torch.randn(2, tokens, 3, 8, generator=generator) for _ in range(4))
    decay, beta = -10.0 * g.abs(), torch.rand(2, tokens, 3, generator=generator)
    out, state = chunk_kda(q, k, v, decay, beta, output_final_state=True)
    assert state is not None
    for row in range(2):
        expected, end = recurrent_kda(q[row], k[row], v[row], decay[row], beta[row])
        torch.testing.assert_close(out[row], expected.float(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state[row], end[0].mT.float(), atol=1e-5, rtol=1e-4)


def test_gradients_of_kda_are_finite_where_it_forgets_at_once() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, 40, 2, 8, generator=generator).requires_grad_() for _ in range(3)]
    decay = torch.full((1, 40, 2, 8), -100.0, requires_grad=True)
    out, _ = chunk_kda(*inputs, decay, torch.rand(1, 40, 2, generator=generator))
    out.sum().backward()
    for x in (*inputs, decay):
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())


def test_an_answer_is_what_followed_the_last_token() -> None:
    source = random.Random(3)
    for _ in range(50):
        asked, answer = prompt(source, 30, 16)
        *text, last = asked
        assert len(set(text)) == 30
        at = text.index(last)
        assert text[at + 1 : at + 17] == answer


def test_the_tokens_to_learn_can_be_known() -> None:
    ids, known = batch(torch.Generator().manual_seed(2), rows=3, blocks=4)
    assert ids.shape == (3, 2 * 4 * BLOCK_TOKENS)
    assert len(known) == 4 * (BLOCK_TOKENS - 1)
    for row in ids.tolist():
        for place in known.tolist():
            assert row[row.index(row[place - 1]) + 1] == row[place]
