"""The best threshold and the best mix of roles: the grid search that PrfaaS section 3.4 describes, over eq. 6.

At fixed roles, Theta_prfaas / p rises with t and Theta_pd-p / (1 - p) falls, so the best t is where they meet (eq. 7);
the best mix is where what both prefill stages produce is what decode consumes (eq. 8). Whole instances meet neither
exactly; `solve_shared` says what they could do if roles were split in time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.throughput import (
    Fleet,
    ThresholdTable,
    Throughput,
    Workload,
    at_index,
    evaluate,
    pd_p_bound,
    tabulate,
)

Floats = NDArray[np.float64]
T_STEP = 100.0
"""Tokens between two thresholds of the grid."""


def threshold_grid(fleet: Fleet, workload: Workload, step_tokens: float = T_STEP) -> Floats:
    """Thresholds to try, [T]: the multiples of the step between the shortest and the longest length, and both ends.

    Without PrfaaS instances only the upper end is left: nothing is offloaded.
    """
    low, high = workload.lengths.low, workload.lengths.high
    if not fleet.n_prfaas:
        return np.array([high], dtype=np.float64)
    inner = np.arange(np.floor(low / step_tokens) + 1, np.ceil(high / step_tokens)) * step_tokens
    return np.concatenate(([0.0], inner, [high]))


def solve(fleet: Fleet, workload: Workload, step_tokens: float = T_STEP, *, min_prefill: int = 1) -> Throughput:
    """The best t and whole N_p, N_d of a fleet. Raises ConfigError where the PD cluster is too small for both roles.

    Exact over the grid. Of equally good points (where decode binds, several are) it takes the one with most room in
    prefill. `min_prefill`: the PD cluster keeps so many, to serve on when the link is gone.
    """
    if fleet.n_pd < min_prefill + 1:
        raise ConfigError(
            f"a PD cluster of {fleet.n_pd} instances cannot have {min_prefill} for prefill and 1 for decode"
        )
    table = tabulate(fleet, workload, threshold_grid(fleet, workload, step_tokens))
    decode_each = fleet.pd_decode.requests_per_s(workload.slo_tokens_per_s, workload.output_tokens)
    best: tuple[float, float, int, int] | None = None
    for n_p in range(min_prefill, fleet.n_pd):
        theta_pd_d = (fleet.n_pd - n_p) * decode_each
        if best is not None and theta_pd_d < best[0]:
            break  # every further prefill instance only takes from decode
        prefill = np.minimum(table.prfaas_bound, pd_p_bound(table, n_p))
        index = int(np.argmax(prefill))
        found = (min(float(prefill[index]), theta_pd_d), float(prefill[index]), index, n_p)
        best = found if best is None or found[:2] > best[:2] else best
    assert best is not None
    return at_index(fleet, workload, table, best[2], best[3], fleet.n_pd - best[3])


def solve_shared(fleet: Fleet, workload: Workload, step_tokens: float = T_STEP) -> Throughput:
    """The best t and fractions of roles: N_p + N_d = N_pd, any real split, as time-shared instances reach it.

    For each t the mix that meets eq. 8 between local prefill and decode is known in closed form; one pass over the grid
    is the whole search.
    """
    table = tabulate(fleet, workload, threshold_grid(fleet, workload, step_tokens))
    decode_each = fleet.pd_decode.requests_per_s(workload.slo_tokens_per_s, workload.output_tokens)
    bound, n_p = _shared(table, fleet.n_pd, decode_each)
    index = int(np.argmax(bound))
    return at_index(fleet, workload, table, index, float(n_p[index]), fleet.n_pd - float(n_p[index]))


def _shared(table: ThresholdTable, n_pd: int, decode_each: float) -> tuple[Floats, Floats]:
    """For every t, Lambda and N_p of the mix where prefill and decode of the PD cluster saturate together. [T], [T]"""
    with np.errstate(invalid="ignore"):
        n_p = np.where(np.isinf(table.pd_p_bound_each), 0.0, n_pd * decode_each / (table.pd_p_bound_each + decode_each))
    return np.minimum(table.prfaas_bound, (n_pd - n_p) * decode_each), n_p


def solve_naive(fleet: Fleet, workload: Workload) -> Throughput:
    """The paper's naive heterogeneous cluster (Table 6): every prefill in the PrfaaS cluster, all of PD decodes."""
    return evaluate(fleet, workload, t_tokens=0.0, n_p=0, n_d=fleet.n_pd)


def over_roles(fleet: Fleet, workload: Workload, t_tokens: float) -> list[Throughput]:
    """Lambda over N_p at a fixed t: Figure 5a."""
    return [evaluate(fleet, workload, t_tokens=t_tokens, n_p=n_p, n_d=fleet.n_pd - n_p) for n_p in range(1, fleet.n_pd)]


def over_thresholds(fleet: Fleet, workload: Workload, n_p: int, step_tokens: float = 1000.0) -> ThresholdTable:
    """Both bounds over t: Figure 5b, with `pd_p_bound(table, n_p)` for the falling one."""
    if not 0 < n_p < fleet.n_pd:
        raise ConfigError(f"N_p must be from 1 to {fleet.n_pd - 1}, got {n_p}")
    return tabulate(fleet, workload, threshold_grid(fleet, workload, step_tokens))
