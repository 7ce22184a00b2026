"""Live against static thresholds when something happens: a short version of `benchmarks.scheduler.replay`."""

from __future__ import annotations

import pytest

from benchmarks.scheduler import replay
from sglang_prfaas.scheduler.lengths import TruncatedLogNormal
from sglang_prfaas.simulate.workload import Arrival, overlaid, poisson

FLEETS = 2
LENGTHS = TruncatedLogNormal(8.6, 1.1, 128.0, 131_072.0)


def arrivals(duration_s: float) -> list[Arrival]:
    """Of the trace's lengths, at a rate that the fleet has room for."""
    return poisson(LENGTHS, rate=9.0, output_tokens=343, duration_s=duration_s, seed=1)


@pytest.mark.parametrize(("name", "duration_s"), [(replay.DROP, 500.0), (replay.BURST, 400.0), (replay.DEAD, 700.0)])
def test_live_is_better_than_the_best_static_threshold(name: str, duration_s: float) -> None:
    case = replay.event(name, arrivals(duration_s), 0.1, FLEETS)
    entry = replay.compare(case, FLEETS, (6000, 9000))
    live, static = entry["event"]["live"], entry["event"]["best_static"]
    assert live["ttft_p90_s"] < 0.9 * static["ttft_p90_s"]
    assert live["throughput"] > 0.97 * static["throughput"]
    assert live["failed"] == static["failed"] == 0
    assert live["requests"] == static["requests"]


def test_copies_at_once_are_as_many_times_the_rate() -> None:
    asked = [Arrival(float(index), 1024, 1, (index, index + 1)) for index in range(10)]
    both = overlaid(asked, 2)
    assert len(both) == 20
    assert both[-1].at_s <= asked[-1].at_s + 1e-5
    assert [entry.at_s for entry in both] == sorted(entry.at_s for entry in both)
    assert len({block for entry in both for block in entry.blocks}) == 22, "they share no prompt"
