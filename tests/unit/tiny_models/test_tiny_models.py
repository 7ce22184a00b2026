"""Tiny models: tokenizer, config, atomic and idempotent writing, command lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.tiny_models import FAMILIES, cpu_server_args, cpu_server_env, family_spec, make_tiny_model
from sglang_prfaas.tiny_models.__main__ import main
from sglang_prfaas.tiny_models.configs import BOS, CONTEXT_TOKENS, EOS, VOCABULARY
from sglang_prfaas.tiny_models.vocabulary import silent_tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    directory = make_tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "qwen3")
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize(
    "text", ["", "Prefill far, decode near.", "zażółć 你好 \n\t x  y", "\x00\x7f\u00ad", "def f(x): return"]
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_facts(tokenizer: Any) -> None:
    assert len(tokenizer) == VOCABULARY
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert tokenizer.model_max_length == CONTEXT_TOKENS


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<s><|system|>Be brief.<|user|>Hi<|assistant|>"
    assert tokenizer(text)["input_ids"][:2] == [BOS, 5]


def test_tokens_that_models_choose_are_text_of_their_own(tokenizer: Any) -> None:
    silent = set(silent_tokens())
    chosen = [token for token in range(VOCABULARY) if token not in silent]
    assert len(chosen) > 300
    assert all(tokenizer.decode([token]).isascii() for token in chosen)
    assert all(tokenizer.decode([token]).strip("\n ").isprintable() for token in chosen)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_written_with_its_config(tmp_path: Path, family: str) -> None:
    model = make_tiny_model(family, tmp_path / family)
    config = json.loads((model / "config.json").read_text())
    assert config == dict(family_spec(family).config)
    assert config["vocab_size"] == VOCABULARY
    assert config["max_position_embeddings"] >= CONTEXT_TOKENS
    assert [path.name for path in tmp_path.iterdir()] == [family]


def test_a_complete_model_is_kept_and_an_old_one_replaced(tmp_path: Path) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model")
    written = (model / "config.json").stat().st_mtime_ns
    assert make_tiny_model("qwen3", model) == model
    assert (model / "config.json").stat().st_mtime_ns == written
    make_tiny_model("kimi-linear", model)
    assert json.loads((model / "config.json").read_text())["model_type"] == "kimi_linear"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no tiny model"):
        make_tiny_model("qwen3", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_unknown_family_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown model family 'gpt'; choose one of kimi-linear, qwen3"):
        make_tiny_model("gpt", tmp_path / "x")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_command_line_of_a_cpu_server(family: str) -> None:
    arguments, environment = cpu_server_args(family), cpu_server_env(family)
    assert arguments[arguments.index("--dtype") + 1] == family_spec(family).config["torch_dtype"]
    assert environment["SGLANG_PLATFORM"] == "prfaas_cpu"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""


def test_command_prints_how_to_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ring", str(tmp_path / "ring")]) == 0
    printed = capsys.readouterr().out
    assert "SGLANG_PLATFORM=prfaas_cpu" in printed
    assert f"--model-path {tmp_path / 'ring'}" in printed
