"""The long timescale on real servers: the router sees the traffic shift, and the agent changes a server's role."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.config import load
from sglang_prfaas.launch.demo_client import Answer, complete
from sglang_prfaas.launch.local_deployment import alive_servers
from sglang_prfaas.site import Site, running
from sglang_prfaas.site.free_ports import free_ports
from sglang_prfaas.tiny_models import cpu_server_args, cpu_server_env, make_tiny_model

from .driving import another_router, get, wait_for, words

pytestmark = pytest.mark.sglang

FAMILY = "qwen3"
NAME = "tiny"
KV_TOKENS = 4096
PREFILL_CLIENTS, DECODE_CLIENTS = 4, 12
"""In decode as many run as may, and the rest waits; in prefill the KVCache of all has room in one decode server."""
ROLES = {
    "enabled": "true",
    "interval_s": "4",
    "confirm": "2",
    "headroom": "1.5",
    "settle_s": "2",
    "backoff_s": "2",
    "drain_s": "2",
    "switch_s": "2",
    "horizon_s": "300",
}

_SITE = """
[site]
name = "pd"
role = "pd"
model = "{model}"
served_model_name = "{name}"
log_dir = "{logs}"
args = {args}

[site.env]
{env}

{servers}
[agent]
port = {agent}
reports_port = {reports}

[transport]
heartbeat_timeout_s = 120

[limits]
startup_timeout_s = 900
"""
_SERVER = """
[[servers]]
name = "{name}"
role = "{role}"
port = {port}
bootstrap_port = {bootstrap}
"""
_ROUTER = """
[router]
model = "{model}"
served_model_name = "{name}"
port = 1

[[sites]]
name = "pd"
role = "pd"
agent_url = "http://127.0.0.1:{agent}"
reports_port = {reports}
"""


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One PD site, a prefill and two decode servers with little room for KVCache, and a router that changes roles."""
    directory: Path = tmp_path_factory.mktemp("roles")
    ports = free_ports(8)
    args = [*cpu_server_args(FAMILY), "--chunked-prefill-size", "512", "--enable-metrics", "--enable-pd-role-switch"]
    args += ["--max-total-tokens", str(KV_TOKENS), "--disable-radix-cache"]
    roles = {"p0": "prefill", "d0": "decode", "d1": "decode"}
    values: dict[str, Any] = {
        "model": make_tiny_model(FAMILY, directory / "model"),
        "name": NAME,
        "logs": directory / "logs",
        "args": args,
        "env": "\n".join(f'{key} = "{value}"' for key, value in cpu_server_env(FAMILY).items()),
        "servers": "".join(
            _SERVER.format(name=name, role=role, port=ports[2 * index], bootstrap=ports[2 * index + 1])
            for index, (name, role) in enumerate(roles.items())
        ),
        "agent": ports[6],
        "reports": ports[7],
    }
    site, router = directory / "pd.toml", directory / "router.toml"
    site.write_text(_SITE.format(**values))
    router.write_text(_ROUTER.format(**values))
    flags = [word for key, value in ROLES.items() for word in (f"--policy.roles.{key}", value)]
    with (
        running(Site(load.load_site(site))),
        another_router(router, directory / "router.log", *flags, roles=roles) as url,
    ):
        yield url


def _roles(url: str) -> tuple[int, int]:
    roles = list(alive_servers(url).values())
    return roles.count("prefill"), roles.count("decode")


def _changes(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [look for look in get(f"{url}/policy")["roles"]["pd"] if look["command"]]
    return found


class Traffic:
    """Clients that ask the same few prompts again and again, so that every answer can be compared with the first."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._first: dict[tuple[str, int], list[int]] = {}
        self.answers: list[Answer] = []

    def ask(self, prompt: str, max_tokens: int) -> Answer:
        answer = complete(self._url, NAME, prompt, max_tokens)
        assert (answer.status, answer.error) == (200, ""), answer.error
        assert answer.token_ids == self._first.setdefault((prompt, max_tokens), answer.token_ids)
        assert len(answer.token_ids) == max_tokens
        self.answers.append(answer)
        return answer

    def until(self, roles: tuple[int, int], prompts: list[str], max_tokens: int, clients: int) -> None:
        """Traffic until the router sees N_p and N_d, and a little longer."""
        stop = threading.Event()
        for prompt in prompts:
            self.ask(prompt, max_tokens)

        def client(number: int) -> None:
            while not stop.is_set():
                number += 1
                self.ask(prompts[number % len(prompts)], max_tokens)

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(client, number) for number in range(clients)]
            try:
                wait_for(f"roles {roles}", lambda: _roles(self._url) == roles or any(c.done() for c in asking))
                seen = len(self.answers)
                wait_for("answers since", lambda: len(self.answers) >= seen + 4 or any(c.done() for c in asking))
            finally:
                stop.set()
            for one in asking:
                one.result()


def test_roles_follow_the_traffic_and_no_request_is_lost(router: str) -> None:
    traffic = Traffic(router)
    traffic.until((2, 1), [words(f"prefill {number}", 150) for number in range(4)], 2, PREFILL_CLIENTS)
    first = _changes(router)[-1]
    assert (first["command"]["role"], first["result"]["succeeded"]) == ("prefill", True)
    assert "with one more prefill" in first["reason"]
    assert _used(first, "prefill") > _used(first, "decode")

    traffic.until((1, 2), [f"decode {number}" for number in range(4)], 400, DECODE_CLIENTS)
    newest = _changes(router)[0]
    assert (newest["command"]["role"], newest["result"]["succeeded"]) == ("decode", True)
    assert "with one more decode" in newest["reason"]
    assert _used(newest, "decode") > _used(newest, "prefill")
    print(f"{len(traffic.answers)} answers; {first['reason']}; {newest['reason']}")


def _used(look: dict[str, Any], role: str) -> float:
    """Work of a role's servers, as a share of what they can do; above 1 where some of it waits."""
    used: float = look["load"][f"{role}_busy"] + look["load"][f"{role}_queued"]
    return used
