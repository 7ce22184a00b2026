"""Counters and histograms of the router, in Prometheus text format."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

Labels = tuple[str, ...]
Gauge = tuple[str, str, Labels, list[tuple[Labels, float]]]
"""Name, help, label names, values by label."""

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)


class Counter:
    """A number per combination of labels, that only grows."""

    def __init__(self, name: str, help_text: str, labels: Labels) -> None:
        self.name = name
        self.help_text = help_text
        self.labels = labels
        self.values: dict[Labels, float] = {}

    def add(self, labels: Labels, amount: float = 1) -> None:
        self.values[labels] = self.values.get(labels, 0) + amount

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.help_text}"
        yield f"# TYPE {self.name} counter"
        for values, amount in sorted(self.values.items()):
            yield f"{self.name}{_labels(self.labels, values)} {amount:g}"


class Histogram:
    """Cumulative buckets, sum and count per combination of labels."""

    def __init__(self, name: str, help_text: str, labels: Labels, bounds: tuple[float, ...]) -> None:
        self.name = name
        self.help_text = help_text
        self.labels = labels
        self.bounds = bounds
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def observe(self, labels: Labels, value: float) -> None:
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * (len(self.bounds) + 1)
            self._sums[labels] = 0.0
        counts[bisect_left(self.bounds, value)] += 1
        self._sums[labels] += value

    def count(self, labels: Labels) -> int:
        return sum(self._counts.get(labels, ()))

    def lines(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.help_text}"
        yield f"# TYPE {self.name} histogram"
        for values, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*map(str, self.bounds), "+Inf"), counts, strict=True):
                total += count
                yield f"{self.name}_bucket{_labels((*self.labels, 'le'), (*values, bound))} {total}"
            yield f"{self.name}_sum{_labels(self.labels, values)} {self._sums[values]:.6g}"
            yield f"{self.name}_count{_labels(self.labels, values)} {total}"


class Metrics:
    """All figures the router counts by itself; gauges are read from their owners when asked for."""

    def __init__(self) -> None:
        self.requests = Counter(
            "prfaas_router_requests_total",
            "Requests answered, by route, reason and status.",
            ("endpoint", "route", "reason", "status"),
        )
        self.retries = Counter(
            "prfaas_router_retries_total",
            "Attempts that failed before the first token, by leg and cause.",
            ("leg", "cause"),
        )
        self.aborts = Counter(
            "prfaas_router_aborts_total", "Requests whose client left, before or after the first byte.", ("phase",)
        )
        self.broken = Counter(
            "prfaas_router_broken_streams_total", "Answers that failed after their first byte was relayed.", ("cause",)
        )
        self.refused = Counter("prfaas_router_refused_total", "Requests refused before routing.", ("status",))
        self.relayed_bytes = Counter("prfaas_router_relayed_bytes_total", "Bytes of answers relayed.", ("route",))
        self.counts = Counter("prfaas_router_token_counts_total", "Prompts counted, exactly or estimated.", ("kind",))
        self.shed = Counter("prfaas_router_shed_total", "Requests answered 429 for the load.", ("reason",))
        self.ttft = Histogram(
            "prfaas_router_ttft_seconds",
            "From a complete request to the first byte of its answer.",
            ("route",),
            _TTFT_S,
        )
        self.held = Histogram(
            "prfaas_router_held_seconds",
            "How long requests waited in the router for a prefill server to have room.",
            ("route",),
            _TTFT_S,
        )
        self.input_tokens = Histogram(
            "prfaas_router_input_tokens", "Prompt tokens per request.", ("route",), tuple(float(t) for t in _TOKENS)
        )

    def render(self, gauges: Iterable[Gauge]) -> bytes:
        """The text of `/metrics`."""
        lines: list[str] = []
        for metric in vars(self).values():
            lines.extend(metric.lines())
        for name, help_text, labels, values in gauges:
            lines.append(f"# HELP {name} {help_text}")
            lines.append(f"# TYPE {name} gauge")
            lines.extend(f"{name}{_labels(labels, key)} {value:g}" for key, value in values)
        return ("\n".join(lines) + "\n").encode()


def _labels(names: Labels, values: Labels) -> str:
    if not names:
        return ""
    escaped = (v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for v in values)
    return "{" + ",".join(f'{n}="{v}"' for n, v in zip(names, escaped, strict=True)) + "}"
