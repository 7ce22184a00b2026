"""Token counting: exact where it matters, estimated elsewhere, never a crash."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.router.body import Endpoint, parse_body
from sglang_prfaas.router.tokens import TokenCount, TokenCounter, count_ids

TEMPLATE = (
    "{% if tools %}{{ tools | length }} tools {% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer without merges (one token per byte) with a chat template, saved as a model would be."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory = tmp_path_factory.mktemp("model")
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def counter(model: Path) -> Iterator[TokenCounter]:
    made = TokenCounter(str(model))
    made.load()
    yield made
    made.close()


def count(
    counter: TokenCounter, endpoint: Endpoint, body: dict[str, Any], low: float = 0, high: float = 1e9
) -> TokenCount:
    return asyncio.run(counter.count(parse_body(endpoint, json.dumps(body).encode()), low, high))


def test_calibrated_at_load(counter: TokenCounter) -> None:
    assert counter.bytes_per_token == 1.0  # a token per byte


def test_texts_are_counted_exactly(counter: TokenCounter) -> None:
    assert count(counter, "completions", {"prompt": "hello é"}) == TokenCount(8, 8, True)
    assert count(counter, "generate", {"text": ["a", "bcd"]}) == TokenCount(3, 4, True)


def test_chats_are_counted_through_the_template(counter: TokenCounter, model: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
    expected = len("<user>hi<assistant><assistant>")
    assert count(counter, "chat", {"messages": messages}) == TokenCount(expected, expected, True)
    tools = [{"type": "function", "function": {"name": "f"}}] * 12
    with_tools = count(counter, "chat", {"messages": messages, "tools": tools})
    assert with_tools.total == expected + len("12 tools ")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert count(counter, "chat", {"messages": messages[:1]}).total == len(ids)


def test_a_continued_answer_has_no_generation_prompt_after_it(counter: TokenCounter) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, "}]
    got = count(counter, "chat", {"messages": messages, "continue_final_message": True})
    assert got.total == len("<user>hi<assistant>yes, ")


def test_media_do_not_count_and_do_not_crash(counter: TokenCounter) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what?"}, picture]}]
    got = count(counter, "chat", {"messages": messages})
    assert got == TokenCount(len("<user>what?<assistant>"), len("<user>what?<assistant>"), False)
    assert count(counter, "chat", {"messages": messages}, low=1e6).total < 100
    texts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert count(counter, "chat", {"messages": texts}).exact


@pytest.mark.parametrize(
    "messages", ["text", 3, [1, 2], [{"role": "user", "content": {"x": 1}}], [{}], [[]], {"a": 1}, [None]]
)
def test_nonsense_is_left_to_the_server(counter: TokenCounter, messages: object) -> None:
    assert count(counter, "chat", {"messages": messages}).total >= 0


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [("chat", {}), ("completions", {}), ("completions", {"prompt": 3}), ("completions", {"prompt": ["a", 3]})],
)
def test_odd_bodies(counter: TokenCounter, endpoint: Endpoint, body: dict[str, Any]) -> None:
    assert count(counter, endpoint, body).total >= 0


def test_far_from_the_threshold_an_estimate_serves(counter: TokenCounter) -> None:
    counter.bytes_per_token = 4.0
    text = "word " * 1000
    estimate = count(counter, "completions", {"prompt": text}, low=10_000, high=30_000)
    assert not estimate.exact
    assert estimate.total == (5000 + 2) // 4
    assert count(counter, "completions", {"prompt": text}, low=1000, high=30_000).exact


def test_exact_counts_calibrate_the_estimate(counter: TokenCounter) -> None:
    counter.bytes_per_token = 4.0
    for _ in range(50):
        count(counter, "completions", {"prompt": "x" * 1000})
    assert counter.bytes_per_token == pytest.approx(1.0, abs=0.05)


def test_escaped_text_is_estimated_by_its_bytes(counter: TokenCounter) -> None:
    counter.bytes_per_token = 3.0
    text = "é" * 300
    escaped = json.dumps({"prompt": text}).encode()
    plain = json.dumps({"prompt": text}, ensure_ascii=False).encode()
    sizes = [counter.estimate(parse_body("completions", raw)).total for raw in (escaped, plain)]
    assert sizes == [300, 200]  # \uXXXX counts as three bytes


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"input_ids": [1, 2, 3]}, TokenCount(3, 3, True)),
        ({"input_ids": []}, TokenCount(0, 0, True)),
        ({"input_ids": [[1, 2, 3], [4]]}, TokenCount(3, 4, True)),
        ({"input_embeds": [[0.5, 1.0], [0.5, 2.0]]}, TokenCount(2, 2, True)),
        ({"text": "a"}, None),
        ({"text": ["a"]}, None),
        ({}, None),
    ],
)
def test_ids_and_embeddings_are_counted_as_they_are(body: dict[str, Any], expected: TokenCount | None) -> None:
    assert count_ids(parse_body("generate", json.dumps(body).encode())) == expected


def test_a_model_without_tokenizer_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"router\.model: no tokenizer could be loaded from"):
        TokenCounter(str(tmp_path)).load()
