"""Time callables on one GPU, interleaved, with the L2 cache flushed and their state restored outside the timed part."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 << 20


class Arm(NamedTuple):
    """``run`` is timed; ``restore`` puts back what it changed and is not."""

    name: str
    run: Callable[[], object]
    restore: Callable[[], object]


class Times(NamedTuple):
    """Milliseconds over all iterations."""

    median_ms: float
    p10_ms: float
    p90_ms: float


def as_graph(arm: Arm) -> Arm:
    """The same work replayed from a CUDA graph. Raises what capture raises where the arm waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            arm.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        arm.run()
    return Arm(arm.name + " (graph)", graph.replay, arm.restore)


def measure(arms: list[Arm], *, warmups: int = 25, iterations: int = 100) -> dict[str, Times]:
    """All arms in turn, ``iterations`` times."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for arm in arms:
        for _ in range(warmups):
            arm.restore()
            arm.run()
    torch.cuda.synchronize()
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {arm.name: [] for arm in arms}
    for _ in range(iterations):
        for arm in arms:
            arm.restore()
            flush.zero_()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            arm.run()
            end.record()
            marks[arm.name].append((begin, end))
        torch.cuda.synchronize()
    return {name: _times([begin.elapsed_time(end) for begin, end in pairs]) for name, pairs in marks.items()}


def _times(samples_ms: list[float]) -> Times:
    ordered = sorted(samples_ms)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Times(at(0.5), at(0.1), at(0.9))


def copy_rate_bytes_per_s(size_bytes: int = 4 << 30) -> float:
    """Bytes read plus written per second by a device-to-device copy of ``size_bytes``."""
    source = torch.empty(size_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = measure([Arm("copy", lambda: target.copy_(source), lambda: None)], warmups=3, iterations=10)
    return 2 * size_bytes / (times["copy"].median_ms / 1e3)
