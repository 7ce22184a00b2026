"""How long a decision, an update of the threshold, and the solver take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import msgspec
import numpy as np

from sglang_prfaas.core.request import RequestView
from sglang_prfaas.scheduler import Observation, ServerView, SiteView, decide, paper
from sglang_prfaas.scheduler.dispatch import DispatchQueue
from sglang_prfaas.scheduler.lengths import nodes
from sglang_prfaas.scheduler.solver import solve, solve_shared
from sglang_prfaas.scheduler.threshold import LiveState, PathLoad, ThresholdController


def _median_s(action: Callable[[], object], rounds: int) -> float:
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def measure() -> dict[str, float]:
    """Medians: a decision with 16 sites and 1,000 servers, a threshold, and the solver over 10,000 GPUs."""
    random = np.random.default_rng(1)
    sites = []
    for number in range(16):
        role = "prfaas" if number < 8 else "pd"
        servers = [
            ServerView(
                f"site-{number}",
                f"server-{index}",
                "prefill" if role == "prfaas" or index % 2 else "decode",
                True,
                int(random.integers(20)),
                int(random.integers(100_000)),
            )
            for index in range(1000 // 16 + (number < 1000 % 16))
        ]
        sites.append(SiteView(f"site-{number}", "prfaas" if role == "prfaas" else "pd", servers))
    observation, request = Observation(sites, 19_400), RequestView(l_total=30_000)

    profile = paper.PAPER_PROFILE
    controller = ThresholdController(
        local=profile.prefill["H20"], prfaas=profile.prefill["H200"], kv=profile.kv, start_t_tokens=19_400
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
        "decision_us": 1e6 * _median_s(lambda: decide(observation, request), 500),
        "dispatch_us": 1e6 * _median_s(take, 500),
        "threshold_us": 1e6 * _median_s(lambda: controller.choose(state, 30_000, 30_000), 500),
        "solver_10000_gpus_s": _median_s(lambda: solve(fleet, workload), 10),
        "solver_shared_10000_gpus_s": _median_s(lambda: solve_shared(fleet, workload), 10),
    }
