"""Time callables on one GPU, interleaved, with the L2 cache flushed and their state restored outside the timed part.

On a CPU (the smoke run) the host's clock is read instead: that shows that everything runs, not how fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

FLUSH_BYTES = 256 << 20


class Arm(NamedTuple):
    """``run`` is timed; ``restore`` puts back what it changed and is not."""

    name: str
    run: Callable[[], object]
    restore: Callable[[], object] = lambda: None


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


def measure(arms: list[Arm], *, device: str, warmups: int = 25, iterations: int = 100) -> dict[str, Times]:
    """All arms in turn, ``iterations`` times."""
    samples = _on_gpu(arms, warmups, iterations) if device == "cuda" else _on_cpu(arms, iterations)
    return {name: _times(values) for name, values in samples.items()}


def _on_gpu(arms: list[Arm], warmups: int, iterations: int) -> dict[str, list[float]]:
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
    return {name: [begin.elapsed_time(end) for begin, end in pairs] for name, pairs in marks.items()}


def _on_cpu(arms: list[Arm], iterations: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(iterations):
        for arm in arms:
            arm.restore()
            begin = time.perf_counter()
            arm.run()
            samples[arm.name].append((time.perf_counter() - begin) * 1e3)
    return samples


def _times(samples_ms: list[float]) -> Times:
    ordered = sorted(samples_ms)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Times(at(0.5), at(0.1), at(0.9))


def copy_rate_bytes_per_s(device: str, size_bytes: int = 4 << 30) -> float:
    """Bytes read plus written per second by a copy of ``size_bytes`` on the device."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    arm = Arm("copy", lambda: target.copy_(source))
    times = measure([arm], device=device, warmups=3, iterations=10)
    return 2 * size_bytes / (times["copy"].median_ms / 1e3)
