"""Servers that die while a KVCache is on its way: a clear end or another path, and service again afterwards."""

from __future__ import annotations

import concurrent.futures

import pytest

from .driving import DECODE, LOCAL, PD, PRFAAS, REMOTE, Driver, wait_for, words

pytestmark = pytest.mark.sglang


def test_prefill_killed_in_mid_transfer(cluster: Driver) -> None:
    cluster.wait_idle(REMOTE, DECODE)
    prompt = words("prefill dies", 3500)
    offset = cluster.log_size(REMOTE)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.ask, prompt)
        # The second chunk begins after the pages of the first were handed to the mover.
        wait_for("the third prefill chunk", lambda: cluster.prefill_batches_since(REMOTE, offset) >= 3)
        cluster.cluster.sites[PRFAAS].kill(REMOTE)
        answer = asked.result()
    # No token had been sent: the router prefills it elsewhere, and the client sees nothing of it.
    cluster.assert_equal(answer, prompt)
    assert answer.routing["prefill"] == "pd/" + LOCAL
    # While no PrfaaS site is alive, everything goes local.
    long = words("nobody far away", 300)
    answer = cluster.ask(long)
    cluster.assert_equal(answer, long)
    assert answer.routing["route"] == "local"
    assert "no PrfaaS prefill server is alive" in answer.routing["reason"]
    cluster.cluster.sites[PRFAAS].wait_ready(REMOTE)
    cluster.wait_idle(REMOTE, LOCAL, DECODE)
    cluster.wait_empty(DECODE)
    _serves_remotely(cluster, "prefill is back")


def test_decode_killed_in_mid_transfer(cluster: Driver) -> None:
    cluster.wait_idle(REMOTE, DECODE)
    offset = cluster.log_size(REMOTE)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.ask, words("decode dies", 3500))
        wait_for("the third prefill chunk", lambda: cluster.prefill_batches_since(REMOTE, offset) >= 3)
        cluster.cluster.sites[PD].kill(DECODE)
        answer = asked.result()
    assert answer.error or answer.status != 200
    # The prefill side let go of the request, and says why.
    cluster.wait_idle(REMOTE)
    failed = wait_for(
        "the prefill side's record",
        lambda: [r for r in cluster.all_records() if r.role == "prefill" and r.status == "failed"],
    )
    assert failed[-1].reason
    cluster.cluster.sites[PD].wait_ready(DECODE)
    _serves_remotely(cluster, "decode is back")


def test_no_local_prefill(cluster: Driver) -> None:
    cluster.cluster.sites[PD].kill(LOCAL)
    prompt = words("nobody at home", 20)
    answer = cluster.ask(prompt)
    cluster.assert_equal(answer, prompt)
    assert answer.routing["route"] == "prfaas"
    cluster.cluster.sites[PD].wait_ready(LOCAL)
    prompt = words("home again", 20)
    answer = wait_for("a local answer", lambda: _local(cluster, prompt))
    cluster.assert_equal(answer, prompt)


def _serves_remotely(cluster: Driver, seed: str) -> None:
    prompt = words(seed, 300)
    answer = wait_for(f"{seed}: a remote answer", lambda: _remote(cluster, prompt))
    cluster.assert_equal(answer, prompt)


def _remote(cluster: Driver, prompt: str):  # type: ignore[no-untyped-def]
    answer = cluster.ask(prompt)
    return answer if answer.status == 200 and answer.routing["route"] == "prfaas" else None


def _local(cluster: Driver, prompt: str):  # type: ignore[no-untyped-def]
    answer = cluster.ask(prompt)
    return answer if answer.status == 200 and answer.routing["route"] == "local" else None
