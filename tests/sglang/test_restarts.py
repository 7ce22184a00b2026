"""The router, an agent and a server end without a word and come back, in seeded orders, while requests go on: every
answer is the single server's, and what the router knows becomes what the servers hold."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.launch.local_deployment import alive_servers
from sglang_prfaas.site import Site
from sglang_prfaas.site.agent import Agent
from sglang_prfaas.site.cache_watch import CacheWatch

from .driving import LOCAL, PD, PRFAAS, REMOTE, ROLES, Driver, RouterProcess, get, prefills_since, wait_for
from .test_cache_routing import generate, ids

pytestmark = pytest.mark.sglang

SITES = {LOCAL: PD, REMOTE: PRFAAS}
LENGTHS = {LOCAL: 400, REMOTE: 900}
"""Of prompts that are prefilled there: t is 512."""
MORE = {LOCAL: 40, REMOTE: 600}
"""What a second turn adds to them, and stays there."""


async def replace_agent(site: Site) -> None:
    """End an agent as a crash would: nobody is told, nothing is cleaned up, its servers go on. Start another one.

    The agent of a site shares its process with the supervisor, whose servers end with it; here it alone ends."""
    crashed = site.agent
    watch = crashed._caches
    owned, watch._owned = watch._owned, None  # the servers' sockets are in it
    crashed._reporter = None
    await crashed.stop(0)
    caches = CacheWatch(site.name, watch._sources, site.config.agent.kv_events_max_blocks, MonotonicClock())
    site.agent = Agent(site.config, site.servers, link_reports=crashed._link_reports, caches=caches)
    site.supervisor.on_change = site.agent.changed
    await site.agent.start()
    caches._owned = owned


class Asker:
    """Asks the same prompts again and again, and notes every answer that is not the single server's."""

    def __init__(self, url: str, prompts: dict[tuple[int, ...], list[int]]) -> None:
        """prompts: with the tokens that must come."""
        self.answered = self.failed = 0
        self.wrong: list[Any] = []
        self._url, self._prompts = url, prompts
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run)

    @contextmanager
    def asking(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            self._thread.join()

    def wait_asked(self, count: int) -> None:
        """Wait until so many more requests have ended, with an answer or without."""
        before = self.answered + self.failed
        wait_for(f"{count} more requests", lambda: self.answered + self.failed >= before + count)

    def _run(self) -> None:
        while not self._stopped.is_set():
            for prompt, expected in self._prompts.items():
                try:
                    _, answer = generate(self._url, list(prompt))
                except (AssertionError, OSError, http.client.HTTPException):
                    self.failed += 1
                    self._stopped.wait(0.2)
                    continue
                self.answered += 1
                if answer["output_ids"] != expected:
                    self.wrong.append((prompt[:8], answer["output_ids"], expected))


def told_by_agents(cluster: Driver) -> dict[str, int]:
    """Blocks of KVCache that the sites' agents have of each server."""
    found = {}
    for running in cluster.cluster.sites.values():

        async def describe(site: Site = running.site) -> dict[str, Any]:
            return site.agent._caches.describe()

        for cache in running._thread.run(describe())["caches"]:
            found[cache["server"]] = cache["held"].device if cache["held"] is not None else 0
    return found


def known_by(url: str) -> dict[str, int]:
    """What a router has of them. States are left out: of them it learns from answers, too."""
    caches = get(f"{url}/cache")["caches"]
    return dict.fromkeys(ROLES, 0) | {cache["server"]: int(cache["held"]["device"]) for cache in caches}


@pytest.mark.parametrize("seed", [2, 3, 5])
def test_in_any_order(cluster: Driver, tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    killed = source.choice((LOCAL, REMOTE))
    survivor = REMOTE if killed == LOCAL else LOCAL
    agent_of = cluster.cluster.sites[source.choice((PD, PRFAAS))]
    router = RouterProcess(cluster.cluster.deployment.router_file, tmp_path / "router.log")

    def restart_router() -> None:
        router.stop(kill=True)
        router.start()

    faults: dict[str, Callable[[], Any]] = {
        "router": restart_router,
        "agent": lambda: agent_of._thread.run(replace_agent(agent_of.site)),
        "server": lambda: cluster.cluster.sites[SITES[killed]].kill(killed),
    }
    order = source.sample(sorted(faults), len(faults))
    about = f"{order}, server {killed}, agent of {agent_of.name}"

    openings = {server: ids(10_000 * seed + length, length) for server, length in LENGTHS.items()}
    prompts = [ids(10_000 * seed + length + 1, length + 50) for length in LENGTHS.values()]
    expected = {tuple(prompt): generate(cluster.reference_url, prompt)[1]["output_ids"] for prompt in prompts}
    asker = Asker(router.url, expected)
    router.start()
    try:
        router.wait_sees(ROLES)
        turns = {}
        for server, opening in openings.items():
            headers, answer = generate(router.url, opening)
            assert headers["x-prfaas-prefill"].endswith(server)
            turns[server] = [*opening, *answer["output_ids"], *ids(10_000 * seed + 7, MORE[server])]
        with asker.asking():
            asker.wait_asked(2)
            for fault in order:
                faults[fault]()
                asker.wait_asked(source.randrange(3))
            cluster.cluster.sites[SITES[killed]].wait_ready(killed)
            router.wait_sees(ROLES)
            answered = asker.answered
            wait_for("requests to be answered again", lambda: asker.answered >= answered + 2 * len(prompts))
        assert not asker.wrong, about

        for url in (router.url, cluster.router_url):
            wait_for(f"{url} to know every server again", lambda: alive_servers(url) == ROLES)  # noqa: B023
            wait_for(
                f"{about}: the index of {url} to be what the servers hold",
                lambda: known_by(url) == told_by_agents(cluster),  # noqa: B023
            )
        for server in (survivor, killed):
            offset = cluster.log_size(server)
            headers, answer = generate(router.url, turns[server])
            assert answer["output_ids"] == generate(cluster.reference_url, turns[server])[1]["output_ids"], about
            assert headers["x-prfaas-prefill"].endswith(server), about
            promised = int(headers["x-prfaas-cached-tokens"])
            assert (promised > 0) == (server == survivor), about
            _, cached = prefills_since(cluster, server, offset)
            assert cached == promised, about
    finally:
        router.stop()
