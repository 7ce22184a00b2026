"""How many requests a second a PD site can serve with other roles: from measured load, or solved over curves."""

from __future__ import annotations

from typing import Protocol

import msgspec
import numpy as np
from msgspec import Struct

from sglang_prfaas.scheduler.lengths import Empirical
from sglang_prfaas.scheduler.solver import threshold_grid
from sglang_prfaas.scheduler.throughput import Fleet, Workload, pd_p_bound, tabulate


class PdLoad(Struct, frozen=True, kw_only=True):
    """What a PD site did over the last interval."""

    n_p: int
    n_d: int
    arrival_rate: float
    """Requests a second."""
    prefill_busy: float
    """Share of the prefill servers' time, 0 to 1."""
    decode_busy: float
    """Share of the decode servers' places, or of their time, 0 to 1."""
    prefill_queued: float = 0.0
    """Work that waits for prefill, as a share of what its servers do in an interval."""
    decode_queued: float = 0.0
    """Requests that wait for decode, as a share of its places."""
    lengths: tuple[float, ...] = ()
    """Uncached lengths of recent requests."""
    output_tokens: float = 0.0
    n_prfaas: float = 0.0
    link_gbps: float = 0.0


class RoleCapacity(Protocol):
    """The rate that the site can serve with given roles. Roles may have fractions: shares of time."""

    def rates(self, load: PdLoad, roles: list[tuple[float, float]]) -> list[float]:
        """Requests a second for every (N_p, N_d)."""


class MeasuredCapacity:
    """No curves needed: as much more of the present traffic as the busier stage has room for.

    It takes t, and so what is offloaded, as given; the short timescale follows once the roles have changed.
    """

    def rates(self, load: PdLoad, roles: list[tuple[float, float]]) -> list[float]:
        work_p = load.n_p * (load.prefill_busy + load.prefill_queued)
        work_d = load.n_d * (load.decode_busy + load.decode_queued)
        return [
            load.arrival_rate * min(n_p / max(work_p, 1e-9), n_d / max(work_d, 1e-9)) if n_p > 0 and n_d > 0 else 0.0
            for n_p, n_d in roles
        ]


class SolvedCapacity:
    """Eq. 3 to 6 over the recent lengths, with the best t for each mix of roles."""

    def __init__(self, fleet: Fleet, *, slo_tokens_per_s: float, min_sample: int = 50, step_tokens: float = 500.0):
        """`fleet`: curves and link; its counts of instances are replaced by those of the load."""
        self._fleet, self._slo, self._min_sample, self._step = fleet, slo_tokens_per_s, min_sample, step_tokens
        self._measured = MeasuredCapacity()

    def rates(self, load: PdLoad, roles: list[tuple[float, float]]) -> list[float]:
        """Falls back on the measured load while there are too few lengths."""
        if len(load.lengths) < self._min_sample or load.output_tokens <= 0:
            return self._measured.rates(load, roles)
        fleet = msgspec.structs.replace(
            self._fleet,
            n_pd=load.n_p + load.n_d,
            n_prfaas=round(load.n_prfaas) if load.link_gbps > 0 else 0,
            egress_gbps=load.link_gbps or self._fleet.egress_gbps,
        )
        workload = Workload(Empirical(np.array(load.lengths)), load.output_tokens, self._slo)
        table = tabulate(fleet, workload, threshold_grid(fleet, workload, self._step))
        decode_each = fleet.pd_decode.requests_per_s(self._slo, load.output_tokens)
        return [
            min(float(np.minimum(table.prfaas_bound, pd_p_bound(table, n_p)).max()), n_d * decode_each)
            for n_p, n_d in roles
        ]
