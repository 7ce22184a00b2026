"""A conversation in two datacenters: the first turn is prefilled in the PD site, the second in the PrfaaS site, which
fetches the first one's cache from there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sglang_prfaas.launch.local_deployment import HICACHE_ARGS, Choices, run_deployment, write_deployment
from sglang_prfaas.store.stats import StoreStats, read_stats

from .driving import REMOTE, Driver, fetch, post, wait_for
from .store_server import OUTPUT_TOKENS, prompt

pytestmark = pytest.mark.sglang

CHOICES = Choices(
    keys=True,
    prefix_caches=True,
    threshold_tokens=300,
    prefill_args=(*HICACHE_ARGS, "--max-total-tokens", "4096", "--page-size", "1", "--enable-cache-report"),
)
FIRST, TAIL = prompt(1, 280), prompt(3, 40)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with run_deployment(write_deployment(tmp_path_factory.mktemp("fetch-pd"), CHOICES)) as running:
        yield Driver(running)


def ask(url: str, tokens: list[int], **headers: str) -> list[int]:
    body = {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True},
    }
    status, _, answer = post(f"{url}/generate", body, headers=headers)
    assert status == 200, answer
    found: list[int] = answer["output_ids"]
    return found


def metric(url: str, name: str) -> float:
    """The sum of a metric over its labels."""
    _, _, text = fetch(f"{url}/metrics")
    lines = [line for line in str(text).splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_the_second_turn_fetches_the_first_ones_cache(sites: Driver) -> None:
    base = sites.cluster.deployment.directory
    first = ask(sites.router_url, FIRST)
    assert first == ask(sites.reference_url, FIRST)
    wait_for(
        "the first turn's pages and state in the PD site's cache",
        lambda: sum(path.is_file() for path in (base / "cache-pd" / "objects").rglob("*")) > len(FIRST),
    )

    turn = FIRST + first + TAIL
    names = ("sglang:prompt_tokens_total", "sglang:cached_tokens_total")
    before = [metric(sites.url(REMOTE), name) for name in names]
    # Left to itself the router keeps it: what is not cached in the PD site is short.
    assert ask(sites.router_url, turn, **{"x-prfaas-route": "prfaas"}) == ask(sites.reference_url, turn)

    def counted() -> list[StoreStats]:
        found = [file.counters for file in read_stats(base / "cache-prfaas" / "stats")]
        return [counters for counters in found if counters.fetched_tokens]

    (counters,) = wait_for("a fetch of the first turn", counted)
    prompt_tokens, cached = (metric(sites.url(REMOTE), name) - was for name, was in zip(names, before, strict=True))
    assert (prompt_tokens, cached) == (len(turn), counters.fetched_tokens)
    assert cached == len(FIRST)
    agent_url = sites.cluster.sites["pd"].agent_url
    assert metric(agent_url, "prfaas_cache_served_bytes_total") == counters.fetched_bytes
    assert metric(agent_url, "prfaas_cache_served_objects_total") == len(FIRST) + 1, "a page each, and one state"
    sent = [record for record in sites.all_records() if record.role == "prefill" and record.site == "prfaas"]
    assert [record.status for record in sent] == ["done"]
