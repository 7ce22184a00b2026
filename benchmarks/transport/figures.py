"""From samples to rows, and from rows to the bars that the mover has to clear."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from benchmarks.transport.compare import Outcome
from benchmarks.transport.links import Link
from benchmarks.transport.workload import Workload

Row = dict[str, Any]
BASELINE = "plain"


def rows_of(link: Link, workload: Workload, outcomes: Sequence[Outcome]) -> list[Row]:
    """A row for each arm that has samples: medians, and the lowest and highest speed. `fraction` is of what the link
    carries with all headers, and without a link's limit of plain sockets, the median of the ratios of each round.
    `exposed` is `exposed_s` of the time that the link needs for the whole request."""
    by_name = {outcome.arm.name: outcome for outcome in outcomes}
    baseline = by_name.get(BASELINE)
    rows = []
    for outcome in outcomes:
        if not outcome.samples:
            continue
        samples, gigabytes = outcome.samples, outcome.samples[0].nbytes / 1e9
        speeds = [sample.gb_per_s for sample in samples]
        cpu_s = [sample.send_cpu_s + sample.receive_cpu_s for sample in samples]
        row: Row = {
            "mover": outcome.arm.name,
            "workload": workload.name,
            "link": link.name,
            "connections": outcome.arm.connections,
            "gb_per_s": _median(speeds),
            "gb_per_s_min": round(min(speeds), 4),
            "gb_per_s_max": round(max(speeds), 4),
            "cpu_s_per_gb": round(statistics.median(cpu_s) / gigabytes, 4),
            "send_cpu_s_per_gb": _median([sample.send_cpu_s / gigabytes for sample in samples]),
            "receive_cpu_s_per_gb": _median([sample.receive_cpu_s / gigabytes for sample in samples]),
            "machine_cpu_s_per_gb": _median([sample.machine_cpu_s / gigabytes for sample in samples]),
            "exposed_s": _median([sample.exposed_s for sample in samples]),
            "items_per_s": round(statistics.median(speeds) * 1e9 / samples[0].nbytes * workload.items, 1),
            "rounds": len(samples),
            "verified": outcome.arm.mover != "iperf3" and all(sample.correct for sample in samples),
            "congestion_control": outcome.about.get("congestion") or link.congestion,
            "tls": outcome.about.get("tls", ""),
        }
        if link.mbps:
            row |= {"fraction": round(row["gb_per_s"] / link.most_gb_per_s, 4), "fraction_of": "link"}
            row["exposed"] = round(row["exposed_s"] * link.most_gb_per_s / gigabytes, 4)
        elif baseline is not None and baseline.samples:
            row |= {"fraction": ratio(outcome, baseline), "fraction_of": BASELINE}
        for name, other in by_name.items():
            if outcome.arm.name.startswith("prfaas") and other is not outcome and other.samples:
                row.setdefault("times", {})[name] = ratio(outcome, other)
        rows.append(row)
    return rows


def failures(link: str, workload: str, outcomes: Sequence[Outcome]) -> list[str]:
    """What went wrong: arms that ended early, and bytes that did not arrive as they were."""
    found = []
    for outcome in outcomes:
        where = f"{outcome.arm.name}, {workload}, {link}"
        if outcome.failure:
            found.append(f"{where}: {outcome.failure}")
        if wrong := sum(not sample.correct for sample in outcome.samples):
            found.append(f"{where}: {wrong} requests arrived with other bytes than were sent")
    return found


def ratio(outcome: Outcome, other: Outcome) -> float:
    """Median of one arm's speed over another's in the same round."""
    others = {sample.round_: sample.gb_per_s for sample in other.samples}
    found = [sample.gb_per_s / others[sample.round_] for sample in outcome.samples if sample.round_ in others]
    return _median(found) if found else 0.0


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)


class Bar(Struct, frozen=True):
    """What a row of the mover has to reach. of: the figure, a key of the row or of its `times`."""

    mover: str
    workload: str
    link: str
    of: str
    limit: float
    at_most: bool = False

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        return f"{self.mover}, {self.workload}, {self.link}: {self.of} {sign} {self.limit:g}"


BARS = (
    *(
        bar
        for workload in ("hybrid", "dense")
        for bar in (
            Bar("prfaas", workload, "loopback", "times plain", 0.9),
            Bar("prfaas", workload, "loopback", "times mooncake", 4.0),
            Bar("prfaas", workload, "loopback", "times nixl", 4.0),
            Bar("prfaas", workload, "loopback", "cpu_s_per_gb", 0.35, at_most=True),
        )
    ),
    Bar("prfaas", "small-serial", "loopback", "items_per_s", 12_000),
    Bar("prfaas", "small", "loopback", "gb_per_s", 2.0),
    Bar("prfaas", "hybrid", "veth-1gbit", "fraction", 0.95),
    Bar("prfaas", "hybrid", "veth-1gbit", "cpu_s_per_gb", 0.8, at_most=True),
    Bar("prfaas", "hybrid-layers", "veth-1gbit", "exposed", 0.15, at_most=True),
    Bar("prfaas", "block", "veth-1gbit", "fraction", 0.95),
    Bar("prfaas", "block", "veth-1gbit", "cpu_s_per_gb", 0.8, at_most=True),
    Bar("prfaas", "hybrid", "rtt-50ms", "fraction", 0.9),
    Bar("prfaas", "dense", "rtt-50ms", "fraction", 0.9),
    Bar("prfaas+bbr", "block", "rtt-50ms", "fraction", 0.9),
    Bar("prfaas+256", "hybrid", "loopback", "times prfaas", 0.95),
    Bar("prfaas+tls", "hybrid", "loopback", "gb_per_s", 1.0),
)
"""256 connections open: "no slower", which a median of a few rounds tells to 5 %."""


def judged(rows: Sequence[Row]) -> list[Row]:
    """Every bar with its figure: `passed` is true, false, or None where it was not measured."""
    found = []
    for bar in BARS:
        figure = None
        for row in rows:
            if (row["mover"], row["workload"], row["link"]) == (bar.mover, bar.workload, bar.link):
                _, times, name = bar.of.rpartition("times ")
                figure = row.get("times", {}).get(name) if times else row.get(name)
        passed = None if figure is None else (figure <= bar.limit if bar.at_most else figure >= bar.limit)
        found.append({"bar": str(bar), "figure": figure, "passed": passed})
    return found
