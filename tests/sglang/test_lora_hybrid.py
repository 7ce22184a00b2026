"""LoRA adapters on a hybrid model in two datacenters: Kimi Linear, whose KDA states and MLA pages move with what the
adapter made of them, and are cached for that adapter only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_prfaas.launch.demo_client import complete
from sglang_prfaas.launch.local_deployment import MODEL_NAME, Choices, run_deployment, write_deployment

from .conftest import RUNNING
from .driving import LOCAL, REMOTE, Driver, get, prefills_since, wait_for, words
from .store_server import prompt
from .test_lora import OUTPUT_TOKENS, expected, generate, held

pytestmark = pytest.mark.sglang

CHOICES = Choices(family="kimi-linear", keys=True, threshold_tokens=300, adapters=("red", "blue"))


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with run_deployment(write_deployment(tmp_path_factory.mktemp("lora-hybrid"), CHOICES)) as running:
        RUNNING.append(running)
        yield Driver(running)
        RUNNING.remove(running)


@pytest.mark.parametrize("adapter", ["red", "blue"])
@pytest.mark.parametrize(("length", "route"), [(20, "local"), (120, "prfaas")])
def test_tokens_are_those_of_one_server_with_the_adapter(sites: Driver, adapter: str, length: int, route: str) -> None:
    asked = words(f"hybrid {adapter}", length)
    answer = complete(sites.router_url, f"{MODEL_NAME}:{adapter}", asked, OUTPUT_TOKENS)
    assert answer.status == 200, answer.error
    assert answer.routing["route"] == route
    assert answer.token_ids == expected(sites, asked, adapter).token_ids
    assert answer.token_ids != expected(sites, asked, None).token_ids, "the adapter must show, or this shows nothing"
    records = sites.records(answer.routing["room"])
    assert {record.status for record in records} == {"done"}
    assert all(record.bytes > 0 for record in records)


@pytest.mark.parametrize(("length", "more", "server"), [(200, 40, LOCAL), (700, 400, REMOTE)])
def test_a_second_turn_finds_what_the_same_adapter_computed(sites: Driver, length: int, more: int, server: str) -> None:
    opening = prompt(length, length)
    before = held(sites, server)
    output, headers = generate(sites.router_url, opening, "red")
    assert headers["x-prfaas-prefill"].endswith(server)
    wait_for("the router to know of red's tokens", lambda: held(sites, server) >= before + length - 1)
    turn = opening + output + prompt(length + 1, more)
    for adapter, cached_expected in (("blue", False), (None, False), ("red", True)):
        offset = sites.log_size(server)
        route = "local" if server == LOCAL else "prfaas"
        tokens, headers = generate(sites.router_url, turn, adapter, **{"x-prfaas-route": route})
        assert tokens == generate(sites.reference_url, turn, adapter)[0]
        assert headers["x-prfaas-prefill"].endswith(server)
        promised = int(headers.get("x-prfaas-cached-tokens", "0"))
        assert prefills_since(sites, server, offset) == (len(turn) - promised, promised)
        assert (promised > 0) == cached_expected, f"{promised} tokens for {adapter} of what red computed"
    assert get(f"{sites.router_url}/cache")["figures"]["broken_promises"] == 0
