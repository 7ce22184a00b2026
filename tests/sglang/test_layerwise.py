"""Layer-wise sending on real SGLang, beside a prefill server that sends chunk by chunk over the same kind of link."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
from pathlib import Path

import pytest

from benchmarks.transport.layerwise import deep_kimi_linear, whole_s
from sglang_prfaas.launch.local_deployment import MODEL_NAME, Choices
from sglang_prfaas.transport.transfer_log import TransferRecord

from .driving import DECODE, LOCAL, REMOTE, Driver, post, wait_for, words

pytestmark = pytest.mark.sglang

RATE_MBPS = 20.0
LAYERWISE, CHUNKWISE = "prfaas", "local"
CHOICES = Choices(
    family="kimi-linear",
    chunk_tokens=2048,
    model_changes=deep_kimi_linear(8, (2, 4, 6)),
    transport={
        "prfaas": {"rate_limit_mbps": RATE_MBPS},
        "pd": {"rate_limit_mbps": RATE_MBPS, "layerwise": "off"},
    },
)


@pytest.fixture(scope="module")
def driver(family_cluster: Driver) -> Driver:
    return family_cluster


def sent(driver: Driver, route: str, prompt: str) -> TransferRecord:
    """What prefill noted of a prompt over a route, whose tokens are those of the single server."""
    answer = driver.ask(prompt, headers={"x-prfaas-route": route})
    driver.assert_equal(answer, prompt)
    return next(r for r in driver.records(answer.routing["room"]) if r.role == "prefill")


@pytest.mark.parametrize("family_cluster", [CHOICES], indirect=True, ids=["kimi-linear"])
class TestLayerwise:
    def test_a_transfer_is_hidden_behind_its_own_prefill_chunk(self, driver: Driver) -> None:
        for route in (LAYERWISE, CHUNKWISE):
            sent(driver, route, words(f"warm {route}", 30))
        for attempt in range(5):  # a busy machine delays a sending thread now and then
            layerwise = sent(driver, LAYERWISE, words(f"one chunk, layers {attempt}", 500))
            chunkwise = sent(driver, CHUNKWISE, words(f"one chunk, whole {attempt}", 500))
            assert chunkwise.ahead_bytes == 0
            assert layerwise.ahead_bytes > 0.8 * layerwise.bytes, "all but states goes ahead"
            assert chunkwise.exposed_s / whole_s(chunkwise) > 0.8
            # What can be hidden is the shorter of the two, however quick this machine is beside the link.
            most_s = min(layerwise.prefill_s, whole_s(chunkwise))
            if chunkwise.exposed_s - layerwise.exposed_s > 0.5 * most_s:
                return
        raise AssertionError((layerwise, chunkwise))

    def test_several_chunks(self, driver: Driver) -> None:
        record = sent(driver, LAYERWISE, words("chunks", 1400))
        assert record.pages > 2 * CHOICES.chunk_tokens
        assert record.ahead_bytes > 0.9 * record.bytes

    def test_several_answers_to_one_prompt_share_pages(self, driver: Driver) -> None:
        """Their prefills run in one batch; the prefix cache keeps the pages of one and frees those of the others."""
        body = {"model": MODEL_NAME, "prompt": words("samples", 150), "max_tokens": 8, "temperature": 0, "n": 3}
        body |= {"return_token_ids": True, "ignore_eos": True}
        request = {"x-prfaas-route": LAYERWISE}
        status, _, answer = post(f"{driver.router_url}/v1/completions", body, headers=request)
        assert status == 200, answer
        _, _, expected = post(f"{driver.reference_url}/v1/completions", body)
        ours = [choice["token_ids"] for choice in answer["choices"]]
        assert len(ours) == 3
        assert ours == [choice["token_ids"] for choice in expected["choices"]]

    def test_many_at_once_with_one_beginning(self, driver: Driver) -> None:
        start = words("beginning", 150)
        prompts = [start + words(f"at once {index}", 30 * index) for index in range(5)]
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            records = list(pool.map(lambda prompt: sent(driver, LAYERWISE, prompt), prompts))
        assert all(record.ahead_bytes for record in records)
        again = sent(driver, LAYERWISE, prompts[0] + words("goes on", 40))
        assert 0 < again.ahead_bytes < again.bytes, (
            "the prefix in the cache goes before the pass, the rest layer by layer"
        )

    def test_a_client_that_leaves_in_the_middle_of_a_pass(self, driver: Driver) -> None:
        driver.wait_idle(REMOTE, LOCAL, DECODE)
        offset = driver.log_size(REMOTE)
        connection = http.client.HTTPConnection(driver.router_url.removeprefix("http://"), timeout=300)
        body = {"model": MODEL_NAME, "prompt": words("leaves", 2000), "max_tokens": 8, "stream": True}
        headers = {"content-type": "application/json", "x-prfaas-route": LAYERWISE}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        wait_for("the second prefill chunk", lambda: driver.prefill_batches_since(REMOTE, offset) >= 2)
        connection.close()
        driver.wait_idle(REMOTE, LOCAL, DECODE)
        driver.wait_empty(DECODE)
        sent(driver, LAYERWISE, words("after leaving", 100))

    def test_the_log_says_which_way_is_taken_and_why(self, driver: Driver) -> None:
        def log(name: str) -> str:
            return Path(next(p for key, p in driver.cluster.logs.items() if key.endswith(name))).read_text()

        assert log(REMOTE).count("KVCache is sent layer by layer") == 1
        assert log(LOCAL).count("KVCache is sent chunk by chunk, not layer by layer: transport.layerwise is off") == 1
