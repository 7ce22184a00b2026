"""Two sites, real SGLang, through the router: the right path, and the tokens of a single server."""

from __future__ import annotations

import concurrent.futures
import json
import math
import random

import pytest

from sglang_prfaas.launch.local_deployment import MODEL_NAME

from .driving import DECODE, LOCAL, REMOTE, Driver, get, post, wait_for, words

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize(("count", "route"), [(3, "local"), (60, "local"), (300, "prfaas"), (1000, "prfaas")])
def test_tokens_equal_those_of_a_single_server(cluster: Driver, count: int, route: str) -> None:
    prompt = words(f"equal-{count}", count)
    answer = cluster.ask(prompt)
    cluster.assert_equal(answer, prompt)
    assert answer.routing["route"] == route
    assert answer.routing["prefill"] == ("pd/" + LOCAL if route == "local" else "prfaas/" + REMOTE)
    assert answer.routing["decode"] == "pd/" + DECODE
    sent, received = sorted(cluster.records(answer.routing["room"]), key=lambda r: r.role, reverse=True)
    assert (sent.role, sent.status, received.role, received.status) == ("prefill", "done", "decode", "done")
    assert sent.bytes == received.bytes > 0
    assert received.pages >= count


def test_chat(cluster: Driver) -> None:
    for count in (10, 400):
        messages = [
            {"role": "system", "content": "answer in words"},
            {"role": "user", "content": words(f"chat-{count}", count)},
        ]
        cluster.assert_equal(cluster.ask(messages), messages)


def test_many_at_once(cluster: Driver) -> None:
    prompts = [words(f"many-{index}", 20 if index % 2 else 250) for index in range(8)]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(cluster.ask, prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        cluster.assert_equal(answer, prompt)
    assert {answer.routing["route"] for answer in answers} == {"local", "prfaas"}


def test_logprobs_are_finite_and_those_of_a_single_server(cluster: Driver) -> None:
    source = random.Random(7)
    body = {
        "input_ids": [source.randrange(10, 500) for _ in range(900)],
        "sampling_params": {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True},
        "return_logprob": True,
    }
    status, headers, answer = post(f"{cluster.router_url}/generate", body)
    assert status == 200, answer
    assert headers["x-prfaas-route"] == "prfaas"
    _, _, expected = post(f"{cluster.reference_url}/generate", body)
    assert answer["output_ids"] == expected["output_ids"]
    ours = [entry[0] for entry in answer["meta_info"]["output_token_logprobs"]]
    theirs = [entry[0] for entry in expected["meta_info"]["output_token_logprobs"]]
    assert len(ours) == 12
    assert all(math.isfinite(value) for value in ours)
    assert ours == pytest.approx(theirs, abs=0.02)


def test_several_answers_to_one_prompt(cluster: Driver) -> None:
    body = {"model": MODEL_NAME, "prompt": words("n", 200), "max_tokens": 8, "temperature": 0, "n": 2}
    body |= {"return_token_ids": True, "ignore_eos": True}
    status, headers, answer = post(f"{cluster.router_url}/v1/completions", body)
    assert status == 200, answer
    assert headers["x-prfaas-route"] == "prfaas"
    _, _, expected = post(f"{cluster.reference_url}/v1/completions", body)
    ours = [choice["token_ids"] for choice in answer["choices"]]
    assert len(ours) == 2
    assert ours == [choice["token_ids"] for choice in expected["choices"]]


def test_structured_output(cluster: Driver) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": words("schema", 200)}],
        "max_tokens": 60,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    }
    status, headers, answer = post(f"{cluster.router_url}/v1/chat/completions", body)
    assert status == 200, answer
    assert headers["x-prfaas-route"] == "prfaas"
    assert isinstance(json.loads(answer["choices"][0]["message"]["content"])["ok"], bool)


def test_a_forced_route(cluster: Driver) -> None:
    prompt = words("forced", 30)
    for route, server in (("prfaas", REMOTE), ("local", LOCAL)):
        answer = cluster.ask(prompt, headers={"x-prfaas-route": route})
        cluster.assert_equal(answer, prompt)
        assert answer.routing["prefill"].endswith(server)


def test_errors_keep_the_openai_shape(cluster: Driver) -> None:
    status, _, answer = post(f"{cluster.router_url}/v1/completions", {"model": "nobody", "prompt": "x"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    status, _, answer = post(
        f"{cluster.router_url}/v1/completions", {"model": MODEL_NAME, "prompt": "x", "max_tokens": -5}
    )
    assert status == 400, answer
    answer = get(f"{cluster.router_url}/v1/models")
    assert [model["id"] for model in answer["data"]] == [MODEL_NAME]


def test_a_client_that_leaves_frees_everything(cluster: Driver) -> None:
    import http.client

    cluster.wait_idle(REMOTE, LOCAL, DECODE)
    offset = cluster.log_size(REMOTE)
    host = cluster.router_url.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=300)
    body = {"model": MODEL_NAME, "prompt": words("leaves", 1500), "max_tokens": 400, "stream": True, "ignore_eos": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    wait_for("the second prefill chunk", lambda: cluster.prefill_batches_since(REMOTE, offset) >= 2)
    connection.close()
    cluster.wait_idle(REMOTE, LOCAL, DECODE)
    cluster.wait_empty(DECODE)
    prompt = words("after leaving", 250)
    cluster.assert_equal(cluster.ask(prompt), prompt)
