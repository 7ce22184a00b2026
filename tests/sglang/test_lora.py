"""LoRA adapters in two datacenters: real servers, real adapters, through the router and the mover."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from sglang_prfaas.launch.demo_client import Answer, complete
from sglang_prfaas.launch.local_deployment import (
    HICACHE_ARGS,
    MODEL_NAME,
    Choices,
    run_deployment,
    write_deployment,
)
from sglang_prfaas.store.stats import StoreStats, read_stats
from sglang_prfaas.tiny_models import make_tiny_adapter

from .conftest import RUNNING
from .driving import DECODE, LOCAL, REMOTE, Driver, get, post, prefills_since, wait_for, words
from .store_server import PAGE_TOKENS, prompt

pytestmark = pytest.mark.sglang

THRESHOLD_TOKENS = 300
CHOICES = Choices(
    family="qwen3",
    keys=True,
    prefix_caches=True,
    threshold_tokens=THRESHOLD_TOKENS,
    adapters=("red", "blue"),
    args=("--page-size", str(PAGE_TOKENS)),
    prefill_args=(*HICACHE_ARGS, "--max-total-tokens", "8192"),
)
OUTPUT_TOKENS = 8


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with run_deployment(write_deployment(tmp_path_factory.mktemp("lora"), CHOICES)) as running:
        RUNNING.append(running)
        yield Driver(running)
        RUNNING.remove(running)


def generate(url: str, tokens: list[int], adapter: str | None, **headers: str) -> tuple[list[int], dict[str, str]]:
    """Output tokens, and the router's headers."""
    sampling = {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": tokens, "sampling_params": sampling, "lora_path": adapter}
    status, answered, answer = post(f"{url}/generate", body, headers=headers)
    assert status == 200, answer
    found: list[int] = answer["output_ids"]
    return found, answered


def held(sites: Driver, server: str) -> int:
    """Blocks that the router knows of on a server's device."""
    caches = get(f"{sites.router_url}/cache")["caches"]
    return next((int(cache["held"]["device"]) for cache in caches if cache["server"] == server), 0)


def expected(sites: Driver, asked: str, adapter: str | None) -> Answer:
    """What the single server says."""
    return complete(sites.reference_url, MODEL_NAME, asked, OUTPUT_TOKENS, lora_path=adapter)


SPELLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "base:adapter": (f"{MODEL_NAME}:red", {}),
    "its own name": ("red", {}),
    "lora_path": (MODEL_NAME, {"lora_path": "red"}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("length", "route"), [(20, "local"), (120, "prfaas")])
def test_tokens_are_those_of_one_server_with_the_adapter(sites: Driver, spelling: str, length: int, route: str) -> None:
    model, options = SPELLINGS[spelling]
    asked = words(f"adapters by {spelling}", length)
    answer = complete(sites.router_url, model, asked, OUTPUT_TOKENS, **options)
    assert answer.status == 200, answer.error
    assert answer.routing["route"] == route
    assert answer.token_ids == expected(sites, asked, "red").token_ids
    assert answer.token_ids != expected(sites, asked, None).token_ids, "the adapter must show, or this shows nothing"
    records = sites.records(answer.routing["room"])
    assert {record.status for record in records} == {"done"}
    assert all(record.bytes > 0 for record in records)


def test_no_prefix_is_matched_across_adapters(sites: Driver) -> None:
    """Neither by the server nor by the router's index: what one adapter computed is of no use to another."""
    asked = prompt(5, 200)
    reusable = (len(asked) - 1) // PAGE_TOKENS * PAGE_TOKENS
    for adapter in ("red", None, "blue"):
        before, offset = held(sites, LOCAL), sites.log_size(LOCAL)
        tokens, headers = generate(sites.router_url, asked, adapter)
        assert tokens == generate(sites.reference_url, asked, adapter)[0]
        assert headers["x-prfaas-prefill"].endswith(LOCAL)
        assert headers.get("x-prfaas-cached-tokens", "0") == "0", f"the index promises {adapter} what another computed"
        assert prefills_since(sites, LOCAL, offset) == (len(asked), 0)
        wait_for(
            f"the router to know of {adapter}'s blocks",
            lambda: held(sites, LOCAL) >= before + reusable // PAGE_TOKENS,  # noqa: B023
        )
    for adapter in ("red", None, "blue"):
        offset = sites.log_size(LOCAL)
        tokens, headers = generate(sites.router_url, asked, adapter)
        assert headers["x-prfaas-cached-tokens"] == str(reusable), "the index knows each adapter's own prefix"
        assert tokens == generate(sites.reference_url, asked, adapter)[0]
        assert prefills_since(sites, LOCAL, offset) == (len(asked) - reusable, reusable)
    assert get(f"{sites.router_url}/cache")["figures"]["broken_promises"] == 0


def test_the_other_site_fetches_what_the_same_adapter_computed(sites: Driver) -> None:
    base = sites.cluster.deployment.directory
    first, tail = prompt(6, 280), prompt(7, 40)

    def stored() -> int:
        return sum(path.is_file() for path in (base / "cache-pd" / "objects").rglob("*"))

    def counted() -> int:
        """Fetched tokens in the statistics, which are written every 2 s."""
        counters: list[StoreStats] = [file.counters for file in read_stats(base / "cache-prfaas" / "stats")]
        return sum(counter.fetched_tokens for counter in counters)

    def fetched(since: int = 0) -> int:
        text = sites.log(REMOTE).read_bytes()[since:].decode(errors="replace")
        return sum(map(int, re.findall(r"prfaas: fetch of (\d+) tokens", text)))

    before = stored()
    opening, headers = generate(sites.router_url, first, "red")
    assert headers["x-prfaas-route"] == "local"
    kept = len(first) // PAGE_TOKENS * PAGE_TOKENS
    wait_for("the first turn in the PD site's store", lambda: stored() >= before + kept // PAGE_TOKENS)
    turn = first + opening + tail
    for adapter, expected_tokens in (("blue", 0), (None, 0), ("red", kept)):
        offset = sites.log_size(REMOTE)
        tokens, headers = generate(sites.router_url, turn, adapter, **{"x-prfaas-route": "prfaas"})
        assert headers["x-prfaas-prefill"].endswith(REMOTE)
        assert tokens == generate(sites.reference_url, turn, adapter)[0]
        computed, cached = prefills_since(sites, REMOTE, offset)
        assert computed + cached == len(turn)
        if expected_tokens:
            assert cached == fetched(offset) >= expected_tokens
            wait_for("all fetches in the statistics", lambda: counted() == fetched())
        else:
            assert cached == 0, f"{adapter} was given what red computed"


def test_adapters_are_listed_and_unknown_ones_refused(sites: Driver) -> None:
    listed = {card["id"]: card["parent"] for card in get(f"{sites.router_url}/v1/models")["data"]}
    assert listed == {MODEL_NAME: None, "red": MODEL_NAME, "blue": MODEL_NAME}
    for body in ({"model": f"{MODEL_NAME}:gone"}, {"model": MODEL_NAME, "lora_path": "gone"}):
        status, _, answer = post(f"{sites.router_url}/v1/completions", {"prompt": "a", **body})
        assert status == 404
        assert answer["error"]["code"] == "model_not_found"
        assert "The LoRA adapter 'gone' is not loaded; loaded: blue, red." in answer["error"]["message"]


def test_an_adapter_that_only_one_site_has(sites: Driver) -> None:
    """Loaded while the servers run, and not in the PrfaaS site: long prompts stay at home."""
    deployment = sites.cluster.deployment
    path = make_tiny_adapter(deployment.directory / "adapters" / "green", deployment.model, 7)
    for url in (sites.url(LOCAL), sites.url(DECODE), sites.reference_url):
        status, _, answer = post(f"{url}/load_lora_adapter", {"lora_name": "green", "lora_path": str(path)})
        assert status == 200, answer
    asked = prompt(8, THRESHOLD_TOKENS + 100)

    def served() -> tuple[list[int], dict[str, str]] | None:
        """None while the router has the lists of before."""
        body = {"text": "a", "lora_path": "green", "sampling_params": {"max_new_tokens": 1}}
        status, _, answer = post(f"{sites.router_url}/generate", body)
        assert status in (200, 404), answer
        return generate(sites.router_url, asked, "green") if status == 200 else None

    tokens, headers = wait_for("the router to know of the adapter", served)
    assert headers["x-prfaas-route"] == "local"
    assert tokens == generate(sites.reference_url, asked, "green")[0]
    assert generate(sites.router_url, asked, None)[1]["x-prfaas-route"] == "prfaas"
