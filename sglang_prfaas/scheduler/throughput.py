"""The throughput model: PrfaaS eq. 1 to 6, over arrays of thresholds.

Symbols are the paper's: Lambda (requests a second), t (threshold, tokens), p = P(L > t), l_long and l_short (mean
length above and below t), N_prfaas, N_p, N_d (instances), Theta (requests a second of a stage), S_kv (bytes), B_out
(egress).
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.core.units import bytes_per_s_to_gbps, gbps_to_bytes_per_s
from sglang_prfaas.scheduler.lengths import LengthDistribution
from sglang_prfaas.scheduler.profiles import DecodeProfile, PrefillProfile

Floats = NDArray[np.float64]
Stage = Literal["prfaas_compute", "prfaas_egress", "pd_prefill", "pd_decode"]


class Workload(Struct, frozen=True):
    """What comes in: uncached input lengths L, mean output length L_out, and the decode rate promised."""

    lengths: LengthDistribution
    output_tokens: float
    slo_tokens_per_s: float


class Fleet(Struct, frozen=True, kw_only=True):
    """One PrfaaS cluster and one PD cluster, and the link between them. `n_prfaas` 0: a PD cluster alone."""

    kv: KvLayout
    pd_prefill: PrefillProfile
    pd_decode: DecodeProfile
    n_pd: int
    prfaas_prefill: PrefillProfile | None = None
    n_prfaas: int = 0
    egress_gbps: float = float("inf")
    """B_out."""


class Throughput(Struct, frozen=True, kw_only=True):
    """Eq. 3 to 6 at one t and one mix of roles. Theta and Lambda in requests a second."""

    t_tokens: float
    n_prfaas: float
    n_p: float
    n_d: float
    p: float
    l_long: float
    l_short: float
    theta_prfaas: float
    theta_pd_p: float
    theta_pd_d: float
    lambda_max: float
    binding: Stage
    """The stage that saturates first."""
    egress_gbps: float
    """What the offloaded requests send at Lambda_max."""


def kv_throughput_gbps(size_bytes: float, prefill_s: float) -> float:
    """Phi_kv(l) = S_kv(l) / T_prefill(l), in Gbps. PrfaaS eq. 1."""
    return bytes_per_s_to_gbps(size_bytes / prefill_s)


def cluster_egress_gbps(gpus: int, gpus_per_instance: int, instance_gbps: float) -> float:
    """B_out = (N / P) * Phi_kv(L_avg), in Gbps. PrfaaS eq. 2."""
    return gpus / gpus_per_instance * instance_gbps


class ThresholdTable(Struct, frozen=True):
    """The parts of eq. 3 to 6 that depend on t alone, at every t of a grid. Arrays [T]; rates in requests a second."""

    t: Floats
    p: Floats
    l_long: Floats
    l_short: Floats
    theta_prfaas: Floats
    """Eq. 3."""
    prfaas_bound: Floats
    """Theta_prfaas / p: infinite where nothing is offloaded."""
    pd_p_bound_each: Floats
    """1 / (T_prefill(l_short) (1 - p)): what one prefill instance allows. Infinite where everything is offloaded."""
    theta_pd_p_each: Floats
    """Eq. 4 for one instance."""
    egress_limited: NDArray[np.bool_]


def tabulate(fleet: Fleet, workload: Workload, t: Floats) -> ThresholdTable:
    """Eq. 3 and 4 at every t; [T]."""
    split = workload.lengths.split(t)
    short_s = fleet.pd_prefill.time_s.over(split.l_short)
    if fleet.n_prfaas and fleet.prfaas_prefill is not None:
        compute = fleet.n_prfaas / fleet.prfaas_prefill.time_s.over(split.l_long)
        egress = gbps_to_bytes_per_s(fleet.egress_gbps) / fleet.kv.sizes_bytes(split.l_long)
    else:
        compute = egress = np.zeros_like(t, dtype=np.float64)
    theta_prfaas = np.minimum(compute, egress)
    with np.errstate(divide="ignore", invalid="ignore"):
        prfaas_bound = np.where(split.p > 0, theta_prfaas / split.p, np.inf)
        pd_p_bound_each = np.where(split.p < 1, 1 / (short_s * (1 - split.p)), np.inf)
    return ThresholdTable(
        t=t,
        p=split.p,
        l_long=split.l_long,
        l_short=split.l_short,
        theta_prfaas=theta_prfaas,
        prfaas_bound=prfaas_bound,
        pd_p_bound_each=pd_p_bound_each,
        theta_pd_p_each=1 / short_s,
        egress_limited=egress < compute,
    )


def pd_p_bound(table: ThresholdTable, n_p: float) -> Floats:
    """Theta_pd-p / (1 - p) of eq. 6, [T]; infinite where everything is offloaded, even without an instance."""
    return table.pd_p_bound_each * n_p if n_p else np.where(table.p < 1, 0.0, np.inf)


def at_index(fleet: Fleet, workload: Workload, table: ThresholdTable, index: int, n_p: float, n_d: float) -> Throughput:
    """Eq. 5 and 6 at one t of the table and one mix of roles."""
    decode_each = fleet.pd_decode.requests_per_s(workload.slo_tokens_per_s, workload.output_tokens)
    theta_pd_d = n_d * decode_each
    prfaas_bound = float(table.prfaas_bound[index])
    prefill_bound = float(pd_p_bound(table, n_p)[index])
    lambda_max = min(prfaas_bound, prefill_bound, theta_pd_d)
    p, l_long = float(table.p[index]), float(table.l_long[index])
    binding: Stage = "pd_decode"
    if prfaas_bound == lambda_max:
        binding = "prfaas_egress" if table.egress_limited[index] else "prfaas_compute"
    elif prefill_bound == lambda_max:
        binding = "pd_prefill"
    return Throughput(
        t_tokens=float(table.t[index]),
        n_prfaas=fleet.n_prfaas,
        n_p=n_p,
        n_d=n_d,
        p=p,
        l_long=l_long,
        l_short=float(table.l_short[index]),
        theta_prfaas=float(table.theta_prfaas[index]),
        theta_pd_p=float(table.theta_pd_p_each[index]) * n_p,
        theta_pd_d=theta_pd_d,
        lambda_max=lambda_max,
        binding=binding,
        egress_gbps=bytes_per_s_to_gbps(lambda_max * p * fleet.kv.size_bytes(l_long)) if p > 0 else 0.0,
    )


def evaluate(fleet: Fleet, workload: Workload, *, t_tokens: float, n_p: float, n_d: float) -> Throughput:
    """Eq. 3 to 6 for one t and one mix of roles."""
    return at_index(fleet, workload, tabulate(fleet, workload, np.array([t_tokens], dtype=np.float64)), 0, n_p, n_d)
