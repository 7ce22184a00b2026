"""Scenarios: the policies to compare over one fleet, and the throughput that each sustains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.config.schema import PolicyConfig, RolesConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.live import LivePolicy
from sglang_prfaas.scheduler.long_term import RolePolicy
from sglang_prfaas.scheduler.role_capacity import SolvedCapacity
from sglang_prfaas.scheduler.solver import solve, solve_shared
from sglang_prfaas.scheduler.throughput import Fleet, Workload
from sglang_prfaas.scheduler.ttft import prefill_only
from sglang_prfaas.simulate.cluster import Cluster, Fault, RoleChangeCost
from sglang_prfaas.simulate.engine import Simulation
from sglang_prfaas.simulate.policies import LiveThreshold, Policy, StaticThreshold, homogeneous, naive
from sglang_prfaas.simulate.result import Result
from sglang_prfaas.simulate.workload import Arrival, poisson
from sglang_prfaas.simulate.world import PD, PRFAAS

OURS = ("live", "shared")
POLICIES = ("homogeneous", "naive", "static", *OURS)


class Scenario(Struct, frozen=True, kw_only=True):
    """A fleet and what happens to it.

    `fetch_prefixes` and role changes hold for ours (live and shared), and so does `ttft_slo_s`, unless `ordered` names
    others; the rest serve in order of arrival, with the roles that they start with.
    """

    fleet: Fleet
    slo_tokens_per_s: float
    n_p: float
    t_tokens: int
    rtt_s: float = 0.0
    cache_blocks: int = 0
    ttft_slo_s: float = 0.0
    ordered: tuple[str, ...] = OURS
    """The policies for which `ttft_slo_s` holds."""
    fetch_prefixes: bool = False
    role_limits: RolesConfig | None = None
    role_cost: RoleChangeCost = RoleChangeCost()
    faults: tuple[Fault, ...] = ()


def objective_s(fleet: Fleet, workload: Workload) -> float:
    """A TTFT objective that suits a fleet: twice the P90 of the prefill time, each request on its path."""
    return 2 * prefill_only(fleet, workload, solve(fleet, workload).t_tokens).p90_s


def cluster_of(scenario: Scenario, name: str, workload: Workload | None = None) -> Cluster:
    """The cluster that a policy runs on.

    homogeneous: PD instances in the place of the PrfaaS ones, with the roles that suit the workload, or else three
    quarters for prefill. shared: one instance does both, sure to prefill for a part of its time, and more where decode
    leaves it.
    """
    fleet, n_p, ours = scenario.fleet, scenario.n_p, name in OURS
    if name == "homogeneous":
        fleet = msgspec.structs.replace(fleet, n_pd=fleet.n_pd + fleet.n_prfaas, n_prfaas=0, prfaas_prefill=None)
        n_p = solve(fleet, workload).n_p if workload else fleet.n_pd * 3 // 4
    elif name == "naive":
        n_p = 0
    elif name == "shared":
        n_p = int(scenario.n_p) + 0.4 if workload is None else _shared_n_p(fleet, workload)
    faults = scenario.faults if fleet.n_prfaas else ()
    return Cluster(
        fleet=fleet,
        n_p=n_p,
        slo_tokens_per_s=scenario.slo_tokens_per_s,
        rtt_s=scenario.rtt_s,
        cache_blocks=scenario.cache_blocks,
        ttft_slo_s=scenario.ttft_slo_s if name in scenario.ordered else 0.0,
        fetch_prefixes=scenario.fetch_prefixes and ours,
        role_changes=scenario.role_cost if name == "live" and scenario.role_limits else None,
        faults=faults,
    )


def _shared_n_p(fleet: Fleet, workload: Workload) -> float:
    """Whole instances below the best real N_p, and one shared; the sure share leaves decode room for its peaks."""
    best = solve_shared(fleet, workload).n_p
    return min(int(best), fleet.n_pd - 2) + max(0.1, (best - int(best)) * 0.3)


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
    cluster = cluster_of(scenario, name, workload)
    roles = None
    if cluster.role_changes is not None:
        roles = RolePolicy(
            SolvedCapacity(scenario.fleet, slo_tokens_per_s=scenario.slo_tokens_per_s), scenario.role_limits
        )
    return Simulation(cluster, policy_of(scenario, name), arrivals, roles=roles).run(progress)


STABLE = 0.985
"""Share of the arrivals that must have their first token within the run: a policy may not let requests pile up."""


class Sustained(Struct, frozen=True, kw_only=True):
    """The highest rate at which P90 TTFT stays within twice its value without load, and no requests pile up.

    All but the first two are at `rate`, means over the seeds; `max_s` is the longest of all.
    """

    rate: float
    unloaded_p90_s: float
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float
    served_share: float
    offloaded_share: float


def at_rate(
    scenario: Scenario,
    name: str,
    workload: Workload,
    *,
    rate: float,
    duration_s: float,
    seeds: Sequence[int] = (1, 2, 3),
) -> Sustained:
    """Poisson arrivals at one rate; means over the seeds, their first tenth left out. `unloaded_p90_s` is 0."""
    found = []
    for seed in seeds:
        arrivals = poisson(
            workload.lengths,
            rate=rate,
            output_tokens=round(workload.output_tokens),
            duration_s=duration_s,
            seed=seed,
        )
        found.append(run_policy(scenario, name, arrivals, workload=workload).summary(duration_s / 10))

    def mean(field: str) -> float:
        return float(np.mean([getattr(entry, field) for entry in found]))

    return Sustained(
        rate=rate,
        unloaded_p90_s=0.0,
        mean_s=mean("ttft_mean_s"),
        p50_s=mean("ttft_p50_s"),
        p90_s=mean("ttft_p90_s"),
        p99_s=mean("ttft_p99_s"),
        max_s=max(entry.ttft_max_s for entry in found),
        served_share=mean("throughput") / mean("arrival_rate"),
        offloaded_share=mean("offloaded_share"),
    )


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
    """Bisect over Poisson rates on a grid of `step`; figures are means over the seeds, their first tenth left out.

    The search begins at 0.75 of what eq. 6 gives; a policy that cannot sustain that is searched from 0 on.
    """

    def measure(rate: float, seconds: float = duration_s) -> Sustained:
        return at_rate(scenario, name, workload, rate=rate, duration_s=seconds, seeds=seeds)

    unloaded_s = measure(0.02, 50 * duration_s).p90_s

    def attempt(steps: int) -> Sustained | None:
        found = measure(steps * step)
        return found if found.p90_s <= factor * unloaded_s and found.served_share >= STABLE else None

    cluster = cluster_of(scenario, name, workload)
    best_possible = solve_shared(cluster.fleet, workload).lambda_max
    low, high = int(0.75 * best_possible / step), ceil(best_possible / step)
    if (best := attempt(low)) is None:
        low, high = 0, low
    while high - low > 1:
        middle = (low + high) // 2
        if (found := attempt(middle)) is not None:
            low, best = middle, found
        else:
            high = middle
    if best is None:
        raise ConfigError(f"policy {name} sustains no rate of {step} requests a second or more")
    return msgspec.structs.replace(best, rate=round(low * step, 6), unloaded_p90_s=unloaded_s)
