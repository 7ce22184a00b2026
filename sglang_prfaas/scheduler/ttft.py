"""TTFT over the length distribution: the paper's, which is prefill alone, and one with queue and transfer.

Queues are M/G/k by the Allen-Cunneen formula: Erlang's C with the variability of the prefill times, and an exponential
tail for those who wait. The transfer is what layer-wise sending leaves after prefill: the recurrent state, and whatever
part of the KV the link is too slow for.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from sglang_prfaas.core.units import gbps_to_bytes_per_s
from sglang_prfaas.scheduler.lengths import nodes
from sglang_prfaas.scheduler.throughput import Fleet, Workload

Floats = NDArray[np.float64]


class Ttft(Struct, frozen=True, kw_only=True):
    """Seconds; infinite where a stage cannot keep up."""

    mean_s: float
    p90_s: float
    queue_mean_s: float = 0.0
    transfer_mean_s: float = 0.0
    """Over the offloaded requests."""
    prfaas_utilisation: float = 0.0
    pd_prefill_utilisation: float = 0.0


def prefill_only(fleet: Fleet, workload: Workload, t_tokens: float) -> Ttft:
    """Table 6's TTFT: T_prefill of the path that each length takes, nothing else."""
    lengths, offloaded = _split(fleet, workload, t_tokens)
    seconds = _prefill_s(fleet, lengths, offloaded)
    return Ttft(mean_s=float(seconds.mean()), p90_s=float(np.quantile(seconds, 0.9)))


def with_queue_and_transfer(
    fleet: Fleet, workload: Workload, *, t_tokens: float, n_p: float, rate: float, rtt_s: float = 0.0
) -> Ttft:
    """TTFT at `rate` requests a second, with the wait for a prefill server and the exposed transfer."""
    lengths, offloaded = _split(fleet, workload, t_tokens)
    seconds = _prefill_s(fleet, lengths, offloaded)
    waits = np.zeros_like(lengths)  # mean wait of those who wait, per length
    shares = np.zeros_like(lengths)  # probability to wait
    used = {}
    for name, chosen, servers in (("prfaas", offloaded, fleet.n_prfaas), ("pd", ~offloaded, n_p)):
        used[name] = 0.0
        if chosen.any():
            utilisation, share, wait_s = _queue(seconds[chosen], rate * float(chosen.mean()), servers)
            used[name], waits[chosen], shares[chosen] = utilisation, wait_s, share
    transfer = np.where(offloaded, _exposed_s(fleet, lengths, seconds, rate, offloaded, rtt_s), 0.0)
    base = seconds + transfer
    return Ttft(
        mean_s=float((base + shares * waits).mean()),
        p90_s=_quantile_of_sum(base, shares, waits, 0.9),
        queue_mean_s=float((shares * waits).mean()),
        transfer_mean_s=float(transfer[offloaded].mean()) if offloaded.any() else 0.0,
        prfaas_utilisation=used["prfaas"],
        pd_prefill_utilisation=used["pd"],
    )


def exposed_transfer_s(
    *, total_bytes: float, state_bytes: float, prefill_s: float, bytes_per_s: float, rtt_s: float = 0.0
) -> float:
    """What is left to send of one request when its prefill ends, in seconds: layer-wise sending overlaps the rest.

    The recurrent state is ready only then. Infinite without a link.
    """
    if bytes_per_s <= 0:
        return float("inf")
    late_s = max(0.0, (total_bytes - state_bytes) / bytes_per_s - prefill_s)
    return late_s + state_bytes / bytes_per_s + rtt_s / 2


def _split(fleet: Fleet, workload: Workload, t_tokens: float) -> tuple[Floats, NDArray[np.bool_]]:
    lengths = nodes(workload.lengths)
    return lengths, (lengths > t_tokens) & (fleet.n_prfaas > 0)


def _prefill_s(fleet: Fleet, lengths: Floats, offloaded: NDArray[np.bool_]) -> Floats:
    local_s = fleet.pd_prefill.time_s.over(lengths)
    if fleet.prfaas_prefill is None:
        return local_s
    return np.where(offloaded, fleet.prfaas_prefill.time_s.over(lengths), local_s)


def _queue(seconds: Floats, rate: float, servers: float) -> tuple[float, float, float]:
    """Utilisation, probability to wait, and mean wait of those who do, of M/G/k."""
    mean_s = float(seconds.mean())
    if servers <= 0 or rate * mean_s >= servers:
        return float("inf") if servers <= 0 else rate * mean_s / servers, 1.0, float("inf")
    utilisation = rate * mean_s / servers
    share = _erlang_c(max(1, round(servers)), utilisation)
    variability = (1 + float(seconds.var()) / mean_s**2) / 2
    return utilisation, share, variability * mean_s / (servers * (1 - utilisation))


def _erlang_c(servers: int, utilisation: float) -> float:
    """Probability that all of k servers are busy."""
    load, blocked = servers * utilisation, 1.0
    for count in range(1, servers + 1):
        blocked = load * blocked / (count + load * blocked)
    return blocked / (1 - utilisation * (1 - blocked))


def _exposed_s(
    fleet: Fleet, lengths: Floats, seconds: Floats, rate: float, offloaded: NDArray[np.bool_], rtt_s: float
) -> Floats:
    """What is left to send when prefill ends, over the part of the link that the other requests leave free."""
    sizes = fleet.kv.sizes_bytes(lengths)
    capacity = gbps_to_bytes_per_s(fleet.egress_gbps)
    offered = rate * float(np.where(offloaded, sizes, 0.0).mean())
    if offered >= capacity:
        return np.full_like(lengths, np.inf)
    free = capacity - offered
    late = np.maximum(0.0, (sizes - fleet.kv.state_bytes) / free - seconds)
    return late + fleet.kv.state_bytes / free + rtt_s / 2


def _quantile_of_sum(base: Floats, shares: Floats, waits: Floats, q: float) -> float:
    """Quantile of base + wait, the wait exponential with probability `shares` and else 0, by bisection."""
    if not np.isfinite(waits).all() or not np.isfinite(base).all():
        return float("inf")
    scale = np.maximum(waits, 1e-12)

    def above(x: float) -> float:
        late = np.clip(x - base, 0.0, None)
        return float(np.where(base > x, 1.0, shares * np.exp(-late / scale)).mean())

    low, high = 0.0, float(base.max() + 60 * scale.max())
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle) > 1 - q else (low, middle)
    return high
