"""Several PrfaaS sites and several PD sites, each pair with a link of its own: the highest rate that all carry.

Each PD site has its share of the traffic, its own lengths and its own threshold; what it offloads may be split over
the PrfaaS sites. For a given total rate every PD site's best mix is known: as few decode instances as the rate needs
(eq. 5), the others prefill, and the highest t that those can bear (eq. 4), which offloads least. Whether the PrfaaS
sites and links can take the rest is a linear program (eq. 3 over pairs). More traffic only makes all of it harder, so
bisection over the rate finds the optimum.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.core.units import bytes_per_s_to_gbps, gbps_to_bytes_per_s
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.linear_program import maximise_sum
from sglang_prfaas.scheduler.profiles import DecodeProfile, PrefillProfile
from sglang_prfaas.scheduler.solver import T_STEP, threshold_grid
from sglang_prfaas.scheduler.throughput import Fleet, ThresholdTable, Workload, pd_p_bound, tabulate

Floats = NDArray[np.float64]


class PdSite(Struct, frozen=True, kw_only=True):
    """A PD site and its part of the traffic. `share` is relative: only the ratio to the other sites' counts."""

    name: str
    prefill: PrefillProfile
    decode: DecodeProfile
    instances: int
    workload: Workload
    share: float = 1.0


class PrfaasSite(Struct, frozen=True, kw_only=True):
    """A PrfaaS site. `links_gbps`: to each PD site by name, no entry is no link; `egress_gbps`: of all together."""

    name: str
    prefill: PrefillProfile
    instances: int
    links_gbps: dict[str, float]
    egress_gbps: float = float("inf")


class PdPlan(Struct, frozen=True, kw_only=True):
    """One PD site at the highest rate. Rates in requests a second."""

    name: str
    rate: float
    t_tokens: float
    n_p: int
    n_d: int
    p: float
    offloaded: dict[str, float]
    """To each PrfaaS site."""
    egress_gbps: dict[str, float]


class SitesPlan(Struct, frozen=True):
    """The highest total rate, and each PD site's part."""

    lambda_max: float
    sites: list[PdPlan]


class _Demand(Struct):
    """What a PD site needs at some rate: its roles, and the requests that it cannot prefill."""

    rate: float
    n_p: int
    n_d: int
    t_tokens: float
    p: float
    l_long: float


def solve_sites(
    kv: KvLayout, pd: list[PdSite], prfaas: list[PrfaasSite], *, step_tokens: float = T_STEP, tolerance: float = 1e-6
) -> SitesPlan:
    """The highest total rate and the plan for it. Raises ConfigError for sites that cannot serve at all.

    Exact up to the grid of t and `tolerance` (relative). Rests on p T_prefill(l_long) falling with t, as eq. 7 does.
    """
    _check(pd, prfaas)
    total = sum(site.share for site in pd)
    shares = [site.share / total for site in pd]
    decode = [site.decode.requests_per_s(site.workload.slo_tokens_per_s, site.workload.output_tokens) for site in pd]
    tables = [_table(kv, site, bool(prfaas), step_tokens) for site in pd]

    def attempt(rate: float) -> tuple[list[_Demand], Floats] | None:
        demands = []
        for site, share, each, table in zip(pd, shares, decode, tables, strict=True):
            demand = _demand(site, table, rate * share, each)
            if demand is None:
                return None
            demands.append(demand)
        flows = _flows(kv, pd, prfaas, demands)
        return None if flows is None else (demands, flows)

    low = 0.0
    high = min((site.instances - 1) * each / share for site, each, share in zip(pd, decode, shares, strict=True))
    found = attempt(high)
    if found is not None:
        low = high
    while high - low > tolerance * high:
        middle = (low + high) / 2
        tried = attempt(middle)
        if tried is None:
            high = middle
        else:
            low, found = middle, tried
    if found is None:
        raise ConfigError("the sites can serve no traffic: their links or instances do not suffice for any rate")
    return SitesPlan(low, [_plan(kv, site, prfaas, *pair) for site, *pair in zip(pd, *found, strict=True)])


def _check(pd: list[PdSite], prfaas: list[PrfaasSite]) -> None:
    names = {site.name for site in pd}
    if not pd or len(names) < len(pd):
        raise ConfigError(f"PD sites need names of their own, and there must be one: {[site.name for site in pd]}")
    for site in pd:
        if site.instances < 2 or site.share <= 0:
            raise ConfigError(f"PD site {site.name}: needs two instances and a positive share")
    for far in prfaas:
        if unknown := set(far.links_gbps) - names:
            raise ConfigError(f"PrfaaS site {far.name}: links to {sorted(unknown)}, but PD sites are {sorted(names)}")


def _table(kv: KvLayout, site: PdSite, offload: bool, step_tokens: float) -> ThresholdTable:
    """Eq. 4 of a PD site over all t; the PrfaaS side is left to the linear program."""
    fleet = Fleet(
        kv=kv,
        pd_prefill=site.prefill,
        pd_decode=site.decode,
        n_pd=site.instances,
        prfaas_prefill=site.prefill if offload else None,
        n_prfaas=1 if offload else 0,
    )
    return tabulate(fleet, site.workload, threshold_grid(fleet, site.workload, step_tokens))


def _demand(site: PdSite, table: ThresholdTable, rate: float, decode_each: float) -> _Demand | None:
    """Roles and t of one site at a rate; None where decode cannot carry it."""
    n_d = max(1, int(np.ceil(rate / decode_each - 1e-9)))
    n_p = site.instances - n_d
    if n_p < 1:
        return None
    bearable = np.flatnonzero(pd_p_bound(table, n_p) >= rate)
    if not len(bearable):
        return None
    index = int(bearable[-1])
    return _Demand(rate, n_p, n_d, float(table.t[index]), float(table.p[index]), float(table.l_long[index]))


def _flows(kv: KvLayout, pd: list[PdSite], prfaas: list[PrfaasSite], demands: list[_Demand]) -> Floats | None:
    """Requests a second from every PD site to every PrfaaS site, [PD, PrfaaS]; None where they cannot be carried."""
    wanted = np.array([demand.rate * demand.p for demand in demands])
    shape = (len(pd), len(prfaas))
    if not wanted.sum():
        return np.zeros(shape)
    if not prfaas:
        return None
    seconds = np.array([[far.prefill.time_s.at(demand.l_long) for far in prfaas] for demand in demands])
    sizes = np.array([kv.size_bytes(demand.l_long) for demand in demands])
    rows, limits = [], []

    def limit(weights: Floats, bound: float) -> None:
        rows.append(weights.ravel())
        limits.append(bound)

    for i, site in enumerate(pd):
        limit(_only(shape, i, None, 1.0), float(wanted[i]))
        for j, far in enumerate(prfaas):
            gbps = far.links_gbps.get(site.name, 0.0)
            if np.isfinite(gbps):
                limit(_only(shape, i, j, 1.0), gbps_to_bytes_per_s(gbps) / float(sizes[i]))
    for j, far in enumerate(prfaas):
        limit(_only(shape, None, j, seconds[:, j]), float(far.instances))
        if np.isfinite(far.egress_gbps):
            limit(_only(shape, None, j, sizes / 1e9), gbps_to_bytes_per_s(far.egress_gbps) / 1e9)
    flows = maximise_sum(np.array(rows), np.array(limits)).reshape(shape)
    return flows if flows.sum() >= wanted.sum() * (1 - 1e-9) else None


def _only(shape: tuple[int, int], i: int | None, j: int | None, value: float | Floats) -> Floats:
    """Zero, but `value` in row i, in column j, or where they cross."""
    weights = np.zeros(shape)
    weights[slice(None) if i is None else i, slice(None) if j is None else j] = value
    return weights


def _plan(kv: KvLayout, site: PdSite, prfaas: list[PrfaasSite], demand: _Demand, flows: Floats) -> PdPlan:
    size = kv.size_bytes(demand.l_long)
    return PdPlan(
        name=site.name,
        rate=demand.rate,
        t_tokens=demand.t_tokens,
        n_p=demand.n_p,
        n_d=demand.n_d,
        p=demand.p,
        offloaded={far.name: float(rate) for far, rate in zip(prfaas, flows, strict=True)},
        egress_gbps={
            far.name: bytes_per_s_to_gbps(float(rate) * size) for far, rate in zip(prfaas, flows, strict=True)
        },
    )
