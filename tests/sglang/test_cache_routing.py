"""Conversations on a hybrid model: the next turn goes where the last one is cached, and only the rest is computed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from .driving import LOCAL, PD, REMOTE, Driver, another_router, get, post, prefills_since, wait_for

pytestmark = pytest.mark.sglang


def ids(seed: int, count: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(10, 500) for _ in range(count)]


def generate(url: str, prompt: list[int]) -> tuple[dict[str, str], dict[str, Any]]:
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    status, headers, answer = post(f"{url}/generate", {"input_ids": prompt, "sampling_params": sampling})
    assert status == 200, answer
    return headers, answer


def held(cluster: Driver, server: str, router_url: str = "") -> dict[str, int]:
    """What the router's index has of a server."""
    caches = get(f"{router_url or cluster.router_url}/cache")["caches"]
    return next((cache["held"] for cache in caches if cache["server"] == server), {"device": 0, "states": 0})


@pytest.mark.parametrize(
    ("first", "more", "route", "server"), [(400, 300, "local", LOCAL), (900, 700, "prfaas", REMOTE)]
)
def test_the_second_turn_computes_its_increment_only(
    cluster: Driver, first: int, more: int, route: str, server: str
) -> None:
    """Of 700 tokens, 400 cached at home, the rest is below t: without the index they would have gone out."""
    before = held(cluster, server)
    opening = ids(first, first)
    headers, answer = generate(cluster.router_url, opening)
    assert headers["x-prfaas-route"] == route
    wait_for(
        f"the router to know what {server} holds",
        lambda: held(cluster, server)["device"] >= before["device"] + first - 1,
    )
    told = get(f"{cluster.router_url}/cache")["figures"]
    offset = cluster.log_size(server)

    second = [*opening, *answer["output_ids"], *ids(first + 1, more)]
    headers, answer = generate(cluster.router_url, second)

    assert headers["x-prfaas-route"] == route
    assert headers["x-prfaas-prefill"].endswith(server)
    promised = int(headers["x-prfaas-cached-tokens"])
    assert first - 64 <= promised <= first
    computed, cached = prefills_since(cluster, server, offset)
    assert cached == promised
    assert computed == len(second) - promised
    figures = get(f"{cluster.router_url}/cache")["figures"]
    assert figures["hit_tokens"] - told["hit_tokens"] == promised
    assert figures["broken_promises"] == told["broken_promises"]
    _, expected = generate(cluster.reference_url, second)
    assert answer["output_ids"] == expected["output_ids"]


def test_a_restarted_server_and_new_routers_lose_no_token(cluster: Driver, tmp_path: Path) -> None:
    """A conversation goes on while routers come and go and the server that holds it is killed: every answer is that of
    a single server, and every router ends with what the server holds. That agents restart: tests/router."""
    opening = ids(31, 400)
    _, answer = generate(cluster.router_url, opening)
    turn = [*opening, *answer["output_ids"], *ids(32, 60)]
    _, expected = generate(cluster.reference_url, turn)

    def known_alike(url: str) -> bool:
        return held(cluster, LOCAL, url) == held(cluster, LOCAL) and held(cluster, LOCAL, url)["device"] > 0

    file = cluster.cluster.deployment.router_file
    with another_router(file, tmp_path / "first.log") as url:
        wait_for("a new router to know what the server holds", lambda: known_alike(url))
        headers, answer = generate(url, turn)
        assert answer["output_ids"] == expected["output_ids"]
        assert headers["x-prfaas-prefill"].endswith(LOCAL)
        assert int(headers["x-prfaas-cached-tokens"]) >= 400 - 64

        cluster.cluster.sites[PD].kill(LOCAL)
        for router in (url, cluster.router_url):
            wait_for("the killed server's blocks to be gone", lambda: held(cluster, LOCAL, router)["device"] == 0)  # noqa: B023
        _, answer = generate(cluster.router_url, turn)
        assert answer["output_ids"] == expected["output_ids"]

    cluster.cluster.sites[PD].wait_ready(LOCAL)
    wait_for("the router to use the server again", lambda: _goes_to(cluster, LOCAL, ids(33, 100)))
    _, answer = generate(cluster.router_url, turn)
    assert answer["output_ids"] == expected["output_ids"]
    with another_router(file, tmp_path / "second.log") as url:
        wait_for("another router to know what the restarted server holds", lambda: known_alike(url))
        _, answer = generate(url, turn)
        assert answer["output_ids"] == expected["output_ids"]


def _goes_to(cluster: Driver, server: str, prompt: list[int]) -> bool:
    headers, _ = generate(cluster.router_url, prompt)
    return headers["x-prfaas-prefill"].endswith(server)
