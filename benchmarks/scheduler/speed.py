"""How long a decision, an update of the threshold, and the solver take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import msgspec
import numpy as np

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.core.request import RequestView, Route
from sglang_prfaas.scheduler import Decision, Observation, ServerView, SiteView, decide, paper
from sglang_prfaas.scheduler.dispatch import DispatchQueue
from sglang_prfaas.scheduler.lengths import nodes
from sglang_prfaas.scheduler.live import LivePolicy
from sglang_prfaas.scheduler.short_term import LeastLoaded
from sglang_prfaas.scheduler.solver import solve, solve_shared
from sglang_prfaas.scheduler.threshold import LiveState, PathLoad, ThresholdController
from sglang_prfaas.scheduler.types import LinkView


def _median_s(action: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _observation(prfaas: int, pd: int, servers_in_all: int) -> Observation:
    """Sites with servers at random loads; every PrfaaS site has a link to every PD site."""
    random = np.random.default_rng(1)
    count = prfaas + pd
    sites = []
    for number in range(count):
        role = "prfaas" if number < prfaas else "pd"
        servers = [
            ServerView(
                f"site-{number}",
                f"server-{index}",
                "prefill" if role == "prfaas" or index % 2 else "decode",
                True,
                int(random.integers(20)),
                int(random.integers(100_000)),
            )
            for index in range(servers_in_all // count + (number < servers_in_all % count))
        ]
        sites.append(SiteView(f"site-{number}", "prfaas" if role == "prfaas" else "pd", servers))
    link = LinkView(bytes_per_s=12.5e9, free_bytes_per_s=12.5e9)
    names = [site.name for site in sites]
    return Observation(sites, 19_400, links={(a, b): link for a in names[:prfaas] for b in names[prfaas:]})


def _live_us(prfaas: int, pd: int, servers: int, rounds: int = 500) -> tuple[float, float]:
    """Medians of a live decision (site, threshold, servers, reason), and of a look at all servers. Microseconds."""
    profile, seen = paper.PAPER_PROFILE, _observation(prfaas, pd, servers)
    policy = LivePolicy(
        kv=profile.kv,
        local={site.name: profile.prefill["H20"] for site in seen.sites if site.role == "pd"},
        prfaas={site.name: profile.prefill["H200"] for site in seen.sites if site.role == "prfaas"},
        settings=PolicyConfig(profile="paper"),
    )
    for site in seen.sites:
        policy.learn(0.0, site.name, 30_000, 1.5)
    moment = policy.look(1.0, seen)
    decision_s = _decision_s(seen, lambda request: policy.decide(moment, seen, request), rounds)
    return 1e6 * decision_s, 1e6 * _median_s(lambda: policy.look(1.0, seen), rounds)


def _decision_s(seen: Observation, decide_on: Callable[[RequestView], Decision], rounds: int = 500) -> float:
    """Median over requests of different lengths, each of which loads its servers, as in the router: nothing that is
    remembered of one holds for all of the next."""
    sites = {site.name: site for site in seen.sites}
    seconds = []
    for tokens in np.random.default_rng(2).integers(500, 120_000, rounds):
        request = RequestView(l_total=int(tokens))
        start = time.perf_counter()
        decision = decide_on(request)
        seconds.append(time.perf_counter() - start)
        for server in (decision.prefill, decision.decode):
            assert server is not None
            server.inflight_requests += 1
            sites[server.site].version += 1
    return statistics.median(seconds)


def _ahead_us(waiting: int, rounds: int = 500) -> float:
    """Median of what goes before a new request on both paths, which every look at the servers asks for."""
    queue: DispatchQueue[int] = DispatchQueue(ttft_slo_s=60.0)
    for index in range(waiting):
        route: Route = "prfaas" if index % 2 else "local"
        queue.add(index, route, arrived_s=0.0, local_s=4.0, prfaas_s=0.5 + index % 7 * 0.5, link_bytes=1e8)
    return 1e6 * _median_s(lambda: (queue.ahead("local", 1.0), queue.ahead("prfaas", 1.0)), rounds)


def measure() -> dict[str, float]:
    """Medians: decisions with a given t (16 sites, 1,000 servers) and live ones, a threshold, the solver."""
    random = np.random.default_rng(1)
    observation, least = _observation(8, 8, 1000), LeastLoaded()
    live_us, look_us = _live_us(1, 1, 100)
    live_sites_us, look_sites_us = _live_us(8, 8, 1000)

    profile = paper.PAPER_PROFILE
    controller = ThresholdController(
        local=profile.prefill["H20"].time_s, prfaas=profile.prefill["H200"].time_s, kv=profile.kv, start_t_tokens=19_400
    )
    for index, length in enumerate(random.permutation(nodes(paper.CASE_STUDY_LENGTHS, 1000))):
        controller.observe(index * 0.3, int(length), int(length))
    state = LiveState(
        now_s=300.0,
        prfaas=PathLoad(servers=4, wait_s=1.0),
        local=PathLoad(servers=3, wait_s=1.0),
        link_gbps=100.0,
    )
    waiting: DispatchQueue[int] = DispatchQueue(ttft_slo_s=60.0)
    for index in range(50):
        waiting.add(index, "prfaas", arrived_s=index * 0.02, local_s=4.0, prfaas_s=0.5 + index % 7 * 0.5)

    def take() -> None:
        key = waiting.take("prfaas", 1.0, [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
        assert key is not None
        waiting.add(key, "prfaas", arrived_s=key * 0.02, local_s=4.0, prfaas_s=0.5 + key % 7 * 0.5)

    fleet = msgspec.structs.replace(paper.case_study_fleet(), n_prfaas=417, n_pd=833, egress_gbps=10_000.0)
    workload = paper.case_study_workload()
    return {
        "decision_us": 1e6 * _decision_s(observation, lambda request: decide(observation, request, least=least)),
        "dispatch_us": 1e6 * _median_s(take, 500),
        **{f"ahead_of_{waiting}_us": _ahead_us(waiting) for waiting in (10, 1_000, 10_000)},
        "live_decision_100_servers_us": live_us,
        "live_look_100_servers_us": look_us,
        "live_decision_16_sites_1000_servers_us": live_sites_us,
        "live_look_16_sites_1000_servers_us": look_sites_us,
        "threshold_us": 1e6 * _median_s(lambda: controller.choose(state, 30_000, 30_000), 500),
        "solver_10000_gpus_s": _median_s(lambda: solve(fleet, workload), 10),
        "solver_shared_10000_gpus_s": _median_s(lambda: solve_shared(fleet, workload), 10),
    }
