"""`/pd_role_switch` with the prfaas backend, both ways, and serving again after each."""

from __future__ import annotations

import concurrent.futures
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from sglang_prfaas.launch.demo_client import Answer

from .driving import DEADLINE_S, DECODE, LOCAL, PD, REMOTE, Driver, fetch, get, post, wait_for, words

pytestmark = pytest.mark.sglang


def through(
    cluster: Driver, prefill: str, decode: str, seed: int, more: list[int] | None = None, length: int = 700
) -> list[int]:
    """One request to two servers of our choice, as a router would send it; checked against the single server."""
    source = random.Random(seed)
    site = cluster.cluster.sites["prfaas" if prefill == REMOTE else "pd"]
    body: dict[str, Any] = {
        "input_ids": [source.randrange(10, 500) for _ in range(length)] + (more or []),
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


def test_a_server_that_prefilled_decodes_with_its_prefix_cache(cluster: Driver) -> None:
    """Its cache was made for prefill. A prompt that repeats, or goes on where one ended, is not lost in it."""
    cluster.switch_role(LOCAL, "decode")
    try:
        first = through(cluster, REMOTE, LOCAL, 5)
        assert [through(cluster, REMOTE, LOCAL, 5) for _ in range(2)] == [first, first]
        through(cluster, REMOTE, LOCAL, 5, more=first)
    finally:
        cluster.switch_role(LOCAL, "prefill")
    through(cluster, LOCAL, DECODE, 5)
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


def test_a_role_changes_by_command_under_requests(cluster: Driver) -> None:
    """The agent drains the server, switches it and brings it back, both ways, while clients go on: no request is lost,
    all tokens are right, and the router knows within a second of the agent."""
    prompts = [words(f"role change {index}", 40 if index % 2 else 170) for index in range(400)]
    asked: list[tuple[str, Answer]] = []
    stop = threading.Event()

    def client(first: int) -> None:
        for prompt in prompts[first::3]:
            if stop.is_set():
                return
            asked.append((prompt, cluster.ask(prompt)))

    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        clients = [pool.submit(client, first) for first in range(3)]
        try:
            wait_for("requests under way", lambda: len(asked) >= 3)
            delay_s = _switched(cluster, pool, "decode", lambda: _by_http(cluster, "decode"))
            before = len(asked)
            wait_for("requests decoded by it", lambda: any(_decoded_by(a, LOCAL) for _, a in asked[before:]))
            delay_back_s = _switched(cluster, pool, "prefill", lambda: _by_command_line(cluster, "prefill"))
            before = len(asked)
            wait_for("requests prefilled by it", lambda: any(_prefilled_by(a, LOCAL) for _, a in asked[before:]))
        finally:
            stop.set()
        for one in clients:
            one.result()
    cluster.wait_usual_roles()
    assert all(answer.status == 200 and not answer.error for _, answer in asked), [a.error for _, a in asked if a.error]
    for prompt, answer in asked:
        cluster.assert_equal(answer, prompt)
    print(f"{len(asked)} requests; the router knew {delay_s:.3f} s and {delay_back_s:.3f} s after the agent")
    assert delay_s < 1.0
    assert delay_back_s < 1.0


def _switched(cluster: Driver, pool: concurrent.futures.Executor, role: str, command: Callable[[], None]) -> float:
    """Run a command that gives LOCAL a role; seconds from when its agent offers it so until the router does."""
    agent_url = cluster.cluster.sites[PD].agent_url
    switching = pool.submit(command)
    seen: dict[str, float] = {}

    def both() -> bool:
        if switching.done():
            switching.result()
        if "agent" not in seen:
            (server,) = [s for s in get(f"{agent_url}/site")["servers"] if s["name"] == LOCAL]
            if (server["role"], server["state"]) != (role, "ready"):
                return False
            seen["agent"] = time.monotonic()
        _, _, answer = fetch(f"{cluster.router_url}/health")
        (server,) = [s for s in answer["servers"] if s["name"] == LOCAL]
        return (server["role"], server["alive"]) == (role, True)

    wait_for(f"the router to see {LOCAL} as {role}", both)
    known = time.monotonic() - seen["agent"]
    switching.result()
    return known


def _by_http(cluster: Driver, role: str) -> None:
    status, _, answer = post(f"{cluster.cluster.sites[PD].agent_url}/control/{LOCAL}/role", {"role": role})
    assert (status, answer["message"]) == (200, f"it is {role} now")


def _by_command_line(cluster: Driver, role: str) -> None:
    file = str(cluster.cluster.deployment.pd_file)
    command = [sys.executable, "-m", "sglang_prfaas.launch", "control", file, LOCAL, role]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"pd/{LOCAL}: it is {role} now\n"


def _decoded_by(answer: Answer, name: str) -> bool:
    return answer.routing.get("decode", "").endswith(name)


def _prefilled_by(answer: Answer, name: str) -> bool:
    return answer.routing.get("prefill", "").endswith(name)
