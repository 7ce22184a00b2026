"""What a cluster must show whose prefill servers run `--linear-attn-prefill-backend prfaas`, and the others do not."""

from __future__ import annotations

import math
import random
import re
from typing import Any

import pytest

from .driving import DECODE, LOCAL, REMOTE, Driver, post

BACKEND = ("--linear-attn-prefill-backend", "prfaas")
CHUNK_TOKENS = 512
"""Prefill chunk and threshold of the clusters: longer prompts are prefilled in the other site, in several chunks."""
OUTPUT_TOKENS = 8


def check(cluster: Driver, operator: str) -> None:
    """Tokens and logprobs through both prefill servers are those of the default backend; their logs say who ran."""
    source = random.Random(operator)
    for length, route in ((3, "local"), (17, "local"), (65, "local"), (CHUNK_TOKENS, "local"), (900, "prfaas")):
        prompt = [source.randrange(10, 500) for _ in range(length)]
        assert _compare(cluster, prompt) == route
    offset = cluster.log_size(REMOTE)
    assert _compare(cluster, prompt + [source.randrange(10, 500) for _ in range(700)]) == "prfaas"
    assert _cached_tokens(cluster, REMOTE, offset) > 0, "the extended prompt found nothing in prefill's radix cache"
    for name in (LOCAL, REMOTE):
        assert f"{operator} runs on torch: the tensors are on the CPU" in _text(cluster, name)
    for log in (_text(cluster, DECODE), cluster.cluster.logs["reference"].read_text(errors="replace")):
        assert f"{operator} runs on" not in log


def _compare(cluster: Driver, prompt: list[int]) -> str:
    """The route of a prompt, after comparing with the single server, whose prefill is SGLang's default."""
    status, headers, answer = post(f"{cluster.router_url}/generate", body(prompt))
    assert status == 200, answer
    _, _, expected = post(f"{cluster.reference_url}/generate", body(prompt))
    assert_equal(answer, expected)
    return headers["x-prfaas-route"]


def body(prompt: list[int]) -> dict[str, Any]:
    """A greedy request with logprobs."""
    return {
        "input_ids": prompt,
        "sampling_params": {"temperature": 0, "max_new_tokens": OUTPUT_TOKENS, "ignore_eos": True},
        "return_logprob": True,
    }


def assert_equal(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    """The same tokens; finite logprobs, equal but for rounding."""
    assert answer["output_ids"] == expected["output_ids"]
    ours, theirs = ([entry[0] for entry in given["meta_info"]["output_token_logprobs"]] for given in (answer, expected))
    assert len(ours) == OUTPUT_TOKENS
    assert all(math.isfinite(logprob) for logprob in ours)
    assert ours == pytest.approx(theirs, abs=1e-3)


def _cached_tokens(cluster: Driver, name: str, offset: int) -> int:
    """Prompt tokens that a server's prefills took from its cache since its log was `offset` bytes long."""
    text = cluster.log(name).read_bytes()[offset:].decode(errors="replace")
    return sum(int(count) for count in re.findall(r"Prefill batch.*#cached-token: (\d+)", text))


def _text(cluster: Driver, name: str) -> str:
    return str(cluster.log(name).read_text(errors="replace"))
