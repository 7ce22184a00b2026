"""`/pd_role_switch` with the prfaas backend, both ways, and serving again after each."""

from __future__ import annotations

import concurrent.futures
import random
from typing import Any

import pytest

from .driving import DECODE, LOCAL, REMOTE, Driver, post, words

pytestmark = pytest.mark.sglang


def through(cluster: Driver, prefill: str, decode: str, seed: int) -> list[int]:
    """One request to two servers of our choice, as a router would send it; checked against the single server."""
    source = random.Random(seed)
    site = cluster.cluster.sites["prfaas" if prefill == REMOTE else "pd"]
    body: dict[str, Any] = {
        "input_ids": [source.randrange(10, 500) for _ in range(700)],
        "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
    }
    pair = {
        **body,
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": site.server(prefill).command.bootstrap_port,
        "bootstrap_room": source.getrandbits(63),
    }
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        legs = [pool.submit(post, f"{cluster.url(name)}/generate", pair) for name in (prefill, decode)]
    (p_status, _, p_answer), (d_status, _, d_answer) = (leg.result() for leg in legs)
    assert (p_status, d_status) == (200, 200), (p_answer, d_answer)
    tokens: list[int] = d_answer["output_ids"]
    assert tokens == post(f"{cluster.reference_url}/generate", body)[2]["output_ids"]
    return tokens


def test_prefill_to_decode_and_back(cluster: Driver) -> None:
    through(cluster, LOCAL, DECODE, 1)
    cluster.switch_role(LOCAL, "decode")
    through(cluster, REMOTE, LOCAL, 2)
    cluster.switch_role(LOCAL, "prefill")
    through(cluster, LOCAL, DECODE, 3)
    cluster.wait_usual_roles()


def test_two_servers_change_places(cluster: Driver) -> None:
    cluster.switch_role(DECODE, "prefill")
    cluster.switch_role(LOCAL, "decode")
    through(cluster, DECODE, LOCAL, 4)
    cluster.switch_role(LOCAL, "prefill")
    cluster.switch_role(DECODE, "decode")
    cluster.wait_usual_roles()
    prompt = words("after the switches", 300)
    cluster.assert_equal(cluster.ask(prompt), prompt)


def test_a_wrong_role_is_refused(cluster: Driver) -> None:
    status, _, answer = post(f"{cluster.url(LOCAL)}/pd_role_switch", {"new_role": "cook"})
    assert status == 400
    assert "cook" in str(answer)
