"""Scenarios: the policies to compare over one fleet, and the throughput that each sustains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.live import LivePolicy
from sglang_prfaas.scheduler.solver import solve, solve_shared
from sglang_prfaas.scheduler.throughput import Fleet, Workload
from sglang_prfaas.simulate.cluster import Cluster, Fault
from sglang_prfaas.simulate.engine import PD, PRFAAS, Simulation
from sglang_prfaas.simulate.policies import LiveThreshold, Policy, StaticThreshold, homogeneous, naive
from sglang_prfaas.simulate.result import Result
from sglang_prfaas.simulate.workload import Arrival, poisson

POLICIES = ("homogeneous", "naive", "static", "live", "shared")


class Scenario(Struct, frozen=True, kw_only=True):
    """A fleet and what happens to it. `order_slack` holds for live and shared; the others serve in order of arrival."""

    fleet: Fleet
    slo_tokens_per_s: float
    n_p: float
    t_tokens: int
    rtt_s: float = 0.0
    cache_blocks: int = 0
    order_slack: float = 0.0
    faults: tuple[Fault, ...] = ()


def cluster_of(scenario: Scenario, name: str, workload: Workload | None = None) -> Cluster:
    """The cluster that a policy runs on.

    homogeneous: PD instances in the place of the PrfaaS ones, with the roles that suit the workload, or else three
    quarters for prefill. shared: half of one decode instance is sure to prefill, and whatever decode leaves beyond.
    """
    fleet, n_p, slack = scenario.fleet, scenario.n_p, 0.0
    if name == "homogeneous":
        fleet = msgspec.structs.replace(fleet, n_pd=fleet.n_pd + fleet.n_prfaas, n_prfaas=0, prfaas_prefill=None)
        n_p = solve(fleet, workload).n_p if workload else fleet.n_pd * 3 // 4
    elif name == "naive":
        n_p = 0
    elif name == "shared":
        slack = scenario.order_slack
        n_p = int(scenario.n_p) + 0.4 if workload is None else _shared_n_p(fleet, workload)
    elif name == "live":
        slack = scenario.order_slack
    faults = scenario.faults if fleet.n_prfaas else ()
    return Cluster(
        fleet=fleet,
        n_p=n_p,
        slo_tokens_per_s=scenario.slo_tokens_per_s,
        rtt_s=scenario.rtt_s,
        cache_blocks=scenario.cache_blocks,
        order_slack=slack,
        faults=faults,
    )


def _shared_n_p(fleet: Fleet, workload: Workload) -> float:
    """Whole instances below the best real N_p, and one shared; the sure share leaves decode room for its peaks."""
    best = solve_shared(fleet, workload).n_p
    return min(int(best), fleet.n_pd - 2) + max(0.1, (best - int(best)) * 0.6)


def policy_of(scenario: Scenario, name: str) -> Policy:
    """A fresh policy. Raises ConfigError for an unknown name."""
    if name == "homogeneous":
        return homogeneous()
    if name == "naive":
        return naive()
    if name == "static":
        return StaticThreshold(scenario.t_tokens)
    if name not in POLICIES:
        raise ConfigError(f"policy {name!r} unknown; there are {', '.join(POLICIES)}")
    fleet = scenario.fleet
    if fleet.prfaas_prefill is None:
        raise ConfigError(f"policy {name} needs a PrfaaS site")
    return LiveThreshold(
        LivePolicy(
            kv=fleet.kv,
            local={PD: fleet.pd_prefill},
            prfaas={PRFAAS: fleet.prfaas_prefill},
            settings=PolicyConfig(threshold_tokens=scenario.t_tokens),
        )
    )


def run_policy(
    scenario: Scenario,
    name: str,
    arrivals: Sequence[Arrival],
    *,
    workload: Workload | None = None,
    progress: Callable[[float], None] | None = None,
) -> Result:
    """One policy over the given requests."""
    return Simulation(cluster_of(scenario, name, workload), policy_of(scenario, name), arrivals).run(progress)


class Sustained(Struct, frozen=True, kw_only=True):
    """The highest rate at which P90 TTFT stays within twice its value without load."""

    rate: float
    unloaded_p90_s: float
    p90_s: float
    """At `rate`, mean over the seeds."""
    offloaded_share: float


def sustained(
    scenario: Scenario,
    name: str,
    workload: Workload,
    *,
    duration_s: float = 5400.0,
    seeds: Sequence[int] = (1, 2, 3),
    step: float = 0.01,
    factor: float = 2.0,
) -> Sustained:
    """Bisect over Poisson rates on a grid of `step`; P90 is the mean over the seeds, their first tenth left out."""

    def p90_s(rate: float, seconds: float = duration_s) -> tuple[float, float]:
        found = []
        for seed in seeds:
            arrivals = poisson(
                workload.lengths,
                rate=rate,
                output_tokens=round(workload.output_tokens),
                duration_s=seconds,
                seed=seed,
            )
            summary = run_policy(scenario, name, arrivals, workload=workload).summary(seconds / 10)
            found.append((summary.ttft_p90_s, summary.offloaded_share))
        mean = np.mean(found, axis=0)
        return float(mean[0]), float(mean[1])

    unloaded, _ = p90_s(0.02, 50 * duration_s)
    cluster = cluster_of(scenario, name, workload)
    top = solve_shared(cluster.fleet, workload).lambda_max * 1.05
    low, high = 1, ceil(top / step)
    best = (unloaded, 0.0)
    while high - low > 1:
        middle = (low + high) // 2
        value = p90_s(middle * step)
        if value[0] <= factor * unloaded:
            low, best = middle, value
        else:
            high = middle
    return Sustained(rate=low * step, unloaded_p90_s=unloaded, p90_s=best[0], offloaded_share=best[1])
