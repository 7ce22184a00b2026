"""What a simulation gives: every request with its times, samples over time, and their summary."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct, field
from numpy.typing import NDArray

from sglang_prfaas.core.units import bytes_per_s_to_gbps
from sglang_prfaas.simulate.servers import Job


class Sample(Struct, frozen=True, kw_only=True):
    """The state at one moment."""

    at_s: float
    t_tokens: int
    prfaas_queue: int
    local_queue: int
    decode_waiting: int
    decode_running: int
    prfaas_alive: int
    prefill_servers: int
    """Of the PD site, in rotation."""
    decode_servers: int
    link_gbps: float
    sent_bytes: float


class Summary(Struct, frozen=True, kw_only=True):
    """Figures of the requests that arrived in a window. Times in seconds, rates a second."""

    requests: int
    failed: int
    retried: int
    broken: int
    """Streams that ended with their decode server."""
    arrival_rate: float
    throughput: float
    """First tokens within the window, a second of it."""
    offloaded_share: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    ttft_max_s: float
    queue_mean_s: float
    prefill_mean_s: float
    transfer_mean_s: float
    """Exposed part: after prefill, of offloaded requests."""
    decode_wait_mean_s: float
    egress_gbps: float
    fetched_share: float
    """Requests that fetched a prefix from the other site's cache."""


class RoleChange(Struct, frozen=True, kw_only=True):
    """One role change as it was carried out."""

    at_s: float
    done_s: float
    server: str
    role: str
    """What it was to be."""
    succeeded: bool
    reason: str


class Result(Struct):
    """One run."""

    jobs: list[Job]
    samples: list[Sample]
    link_bytes: float = 0.0
    busy_s: dict[str, float] = field(default_factory=dict)
    role_changes: list[RoleChange] = field(default_factory=list)

    def ttft_s(self, start_s: float = 0.0, end_s: float = float("inf")) -> NDArray[np.float64]:
        """TTFT of the requests that arrived in [start, end) and were served."""
        return np.array(
            [
                job.first_token_s - job.arrival.at_s
                for job in self.jobs
                if start_s <= job.arrival.at_s < end_s and job.first_token_s >= 0
            ]
        )

    def summary(self, start_s: float = 0.0, end_s: float | None = None) -> Summary:
        """The figures of the requests that arrived in [start, end), by default all."""
        end_s = self.jobs[-1].arrival.at_s + 1e-9 if end_s is None else end_s
        jobs = [job for job in self.jobs if start_s <= job.arrival.at_s < end_s]
        served = [job for job in jobs if job.first_token_s >= 0]
        ttft = np.array([job.first_token_s - job.arrival.at_s for job in served]) if served else np.array([np.nan])
        far = [job for job in served if job.route == "prfaas"]
        span_s = end_s - start_s
        in_window = sum(start_s <= job.first_token_s < end_s for job in self.jobs)
        p50, p90, p99 = (float(value) for value in np.quantile(ttft, (0.5, 0.9, 0.99)))
        return Summary(
            requests=len(jobs),
            failed=sum(job.failed for job in jobs),
            retried=sum(job.retries > 0 for job in jobs),
            broken=sum(job.broken for job in jobs),
            arrival_rate=len(jobs) / span_s,
            throughput=in_window / span_s,
            offloaded_share=len(far) / max(1, len(served)),
            ttft_mean_s=float(ttft.mean()),
            ttft_p50_s=p50,
            ttft_p90_s=p90,
            ttft_p99_s=p99,
            ttft_max_s=float(ttft.max()),
            queue_mean_s=_mean([job.prefill_start_s - job.arrival.at_s for job in served]),
            prefill_mean_s=_mean([job.prefill_end_s - job.prefill_start_s for job in served]),
            transfer_mean_s=_mean([job.arrived_s - job.prefill_end_s for job in far]),
            decode_wait_mean_s=_mean([job.first_token_s - job.arrived_s for job in served]),
            egress_gbps=bytes_per_s_to_gbps(sum(job.move_bytes for job in far) / span_s),
            fetched_share=sum(job.fetch_bytes > 0 for job in served) / max(1, len(served)),
        )

    def over_time(self) -> dict[str, list[Any]]:
        """The samples as columns, with the egress of each interval and the mean TTFT of its arrivals."""
        columns: dict[str, list[Any]] = {
            name: [getattr(sample, name) for sample in self.samples]
            for name in Sample.__struct_fields__
            if name != "sent_bytes"
        }
        egress = [0.0]
        for before, after in zip(self.samples, self.samples[1:], strict=False):
            seconds = max(1e-9, after.at_s - before.at_s)
            egress.append(bytes_per_s_to_gbps((after.sent_bytes - before.sent_bytes) / seconds))
        edges = [sample.at_s for sample in self.samples]
        sums, counts = np.zeros(len(edges)), np.zeros(len(edges))
        for job in self.jobs:
            if job.first_token_s >= 0:
                index = min(int(np.searchsorted(edges, job.arrival.at_s, side="right")), len(edges) - 1)
                sums[index] += job.first_token_s - job.arrival.at_s
                counts[index] += 1
        ttft = [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]
        return {**columns, "egress_gbps": egress[: len(edges)], "ttft_mean_s": ttft}


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0
