"""Which models need checkpoints, and what the index is not asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PretrainedConfig

from sglang_prfaas.config.schema import PolicyConfig, PrefixIndexConfig, RouterConfig, RouterSection, RouterSite
from sglang_prfaas.prefix_cache.block_hash import Namespace, PromptHashes
from sglang_prfaas.prefix_cache.change_log import HolderChange
from sglang_prfaas.prefix_cache.changes import Stored
from sglang_prfaas.prefix_cache.holder_sets import Tier
from sglang_prfaas.prefix_cache.matching import Holder
from sglang_prfaas.router.body import ParsedBody, parse_body
from sglang_prfaas.router.prefix_lookup import PrefixIndex, keeps_states, model_config, needs_checkpoints
from sglang_prfaas.router.tokens import TokenCounter
from sglang_prfaas.tiny_models.families import FAMILIES


@pytest.mark.parametrize(
    ("family", "expected"),
    [("qwen3", False), ("swa", True), ("kimi-linear", True), ("qwen3-next", True), ("ring", True)],
)
def test_families_that_keep_states_need_checkpoints(family: str, expected: bool) -> None:
    config = FAMILIES[family].config
    assert keeps_states(config) is expected
    assert keeps_states({"text_config": config}) is expected


def test_an_unknown_model_is_taken_for_a_hybrid_one() -> None:
    assert needs_checkpoints(PrefixIndexConfig(), None)
    assert not needs_checkpoints(PrefixIndexConfig(checkpoints="off"), None)
    assert needs_checkpoints(PrefixIndexConfig(checkpoints="on"), FAMILIES["qwen3"].config)


def test_no_model_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The router is made in its event loop: a hub that does not answer would stop it."""
    asked: list[dict[str, Any]] = []

    def asks(model: str, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append(options)
        raise OSError(f"{model} is not on this machine")

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", asks)
    assert model_config("nobody/no-such-model") is None
    assert asked == [{"local_files_only": True}]
    assert model_config(str(tmp_path / "nothing")) is None
    assert len(asked) == 1


def index(tmp_path: Path, policy: PolicyConfig | None = None, adapter_ids: dict[str, str] | None = None) -> PrefixIndex:
    (tmp_path / "config.json").write_text(json.dumps(dict(FAMILIES["qwen3"].config)))
    site = RouterSite(name="a", role="pd", agent_url="http://h:1", reports_port=2)
    return PrefixIndex(
        RouterConfig(
            router=RouterSection(model=str(tmp_path), served_model_name="tiny"),
            sites=[site],
            prefix_index=PrefixIndexConfig(min_tokens=8, max_blocks=1000),
            policy=policy or PolicyConfig(),
        ),
        (adapter_ids or {}).get,
    )


def test_prefixes_are_fetched_where_the_configuration_says_so(tmp_path: Path) -> None:
    assert not index(tmp_path).fetches
    assert index(tmp_path, PolicyConfig(fetch_prefixes=True)).fetches


def body(**fields: Any) -> ParsedBody:
    return parse_body("generate", json.dumps({"input_ids": list(range(40)), **fields}).encode())


def store(it: PrefixIndex, tokens: int, size: int, server: str = "p") -> None:
    hashes = PromptHashes(list(range(tokens)), size).all
    it.apply(HolderChange(Holder("a", server), Stored(hashes, Tier.DEVICE), size))


def test_only_prompts_that_could_match_are_tokenised(tmp_path: Path) -> None:
    it = index(tmp_path)
    assert not it.wants(body(), lambda: 40)  # nothing is held
    store(it, 16, 4)
    assert it.wants(body(), lambda: 40)
    assert not it.wants(body(), lambda: 7)
    assert not it.wants(body(lora_path="x"), lambda: 40)
    assert not it.wants(body(extra_key="x"), lambda: 40)
    assert not it.wants(body(model="tiny:adapter"), lambda: 40)
    assert not it.wants(body(model="adapter"), lambda: 40)
    assert it.wants(body(model="tiny"), lambda: 40)


def test_adapters_and_salts_share_no_block(tmp_path: Path) -> None:
    """The same prompt under other salts and adapters: no hash in common, and none matches in the cache of another."""
    prompt = list(range(40))
    spaces = [
        Namespace(cache_salt=salt, extra_key=adapter) for salt in (None, "a", "b") for adapter in (None, "red", "blue")
    ]
    hashes = [PromptHashes(prompt, 4, space).all for space in spaces]
    assert len(set(np.concatenate(hashes).tolist())) == sum(map(len, hashes))
    for number, mine in enumerate(hashes):
        it = index(tmp_path)
        for other, theirs in enumerate(hashes):
            if other != number:
                it.apply(HolderChange(Holder("a", "p"), Stored(theirs, Tier.DEVICE), 4))
        assert it.index.match(PromptHashes(prompt, 4, spaces[number])).by_holder == {}
        it.apply(HolderChange(Holder("a", "p"), Stored(mine, Tier.DEVICE), 4))
        assert it.index.match(PromptHashes(prompt, 4, spaces[number])).by_holder[Holder("a", "p")].device_blocks == 10


def test_an_adapter_whose_id_is_known_is_looked_up(tmp_path: Path) -> None:
    """Its own blocks only, by whatever name it was selected; without an id nothing is."""
    it = index(tmp_path, adapter_ids={"red": "1" * 32, "blue": "2" * 32})
    prompt = list(range(40))
    for adapter, blocks in ((None, 2), ("1" * 32, 6)):
        hashes = PromptHashes(prompt, 4, Namespace(extra_key=adapter)).upto(blocks)
        it.apply(HolderChange(Holder("a", "p"), Stored(hashes, Tier.DEVICE), 4))

    def cached(adapter: str | None, **fields: Any) -> int:
        request = body(**fields)
        request.adapter, request.token_ids = adapter, prompt
        if not it.wants(request, lambda: 40):
            return -1
        found = it.match(request).get("a")
        return found.servers["p"] if found is not None else 0

    assert cached(None) == 8
    assert cached("red", lora_path="red") == cached("red", model="tiny:red") == cached("red", model="red") == 24
    assert cached("blue", lora_path="blue") == 0
    assert cached("green", lora_path="green") == -1
    assert cached(None, lora_path=["red", None]) == -1
    assert cached("red", lora_path="red", extra_key="k") == -1


def test_servers_may_have_blocks_of_different_sizes(tmp_path: Path) -> None:
    it = index(tmp_path)
    store(it, 16, 4, "p")
    store(it, 32, 8, "q")
    prompt = body()
    prompt.token_ids = list(range(40))
    assert it.match(prompt)["a"].servers == {"p": 16, "q": 32}


def test_the_last_token_is_always_computed(tmp_path: Path) -> None:
    it = index(tmp_path)
    store(it, 40, 4)
    prompt = body()
    prompt.token_ids = list(range(40))
    assert it.match(prompt)["a"].servers == {"p": 36}


def test_a_state_that_only_an_answer_told_of_is_learnt(tmp_path: Path) -> None:
    it = index(tmp_path)
    it.hybrid = True
    store(it, 32, 4)
    prompt = body()
    prompt.token_ids = list(range(40))
    assert it.match(prompt) == {}
    it.told(prompt, "a", "p", 0, 18)  # in the middle of a block: of another kind of cache
    it.told(prompt, "a", "p", 0, 36)  # beyond what is known to be there
    assert it.match(prompt) == {}
    it.told(prompt, "a", "p", 0, 16)
    assert it.match(prompt)["a"].servers == {"p": 16}
    it.told(prompt, "a", "p", 16, 0)
    assert it.match(prompt) == {}


def test_a_forgotten_site_holds_nothing(tmp_path: Path) -> None:
    it = index(tmp_path)
    store(it, 16, 4)
    it.forget("b")
    assert it.describe()["caches"][0]["held"].device == 4
    it.forget("a")
    assert it.describe()["caches"] == []
    assert it.index.holders == ()


def test_token_ids_come_from_the_body_or_the_tokenizer() -> None:
    class Words:
        chat_template = None

        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [len(word) for word in text.split()]

    counter = TokenCounter("m")
    counter.use(Words())
    for fields, expected in (
        ({"input_ids": [5, 6, 7]}, [5, 6, 7]),
        ({"input_ids": [[5], [6, 7]]}, [6, 7]),
        ({"text": "a bb ccc"}, [1, 2, 3]),
        ({"text": ["a", "a bb"]}, [1, 2]),
    ):
        found = parse_body("generate", json.dumps(fields).encode())
        count = counter._find_ids(found)
        assert found.token_ids == expected
        assert count is not None
        assert count.longest == len(expected)
    floats = parse_body("generate", json.dumps({"input_embeds": [[0.5, 0.25]]}).encode())
    assert counter._find_ids(floats) is None
    assert floats.token_ids is None
