"""One server's load over time: the newest of what came in, rates from its counters, and how old it is.

A state machine without sockets: figures in, `ServerLoad` out, the clock passed in.
"""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.monitor.reports import ServerLoad
from sglang_prfaas.monitor.sglang_loads import Figures, add


class _Sample(Struct, frozen=True):
    """Counters at a time, as SGLang's figures have them."""

    at_s: float
    prefill_tokens: float
    prefill_busy_s: float
    decode_tokens: float
    decode_steps: float
    decode_busy_s: float


class ServerLoadTracker:
    """Takes in what a server says, and tells its load now. Not thread-safe."""

    def __init__(self, server: str, clock: Clock, *, window_s: float = 10.0) -> None:
        """window_s: over which rates are taken."""
        self._server = server
        self._clock = clock
        self._window_s = window_s
        self._full: Figures | None = None
        self._full_at_s = 0.0
        self._stats: dict[int, Figures] = {}
        self._stats_at_s: dict[int, float] = {}
        self._stat_ranks = 1
        self._samples: deque[_Sample] = deque()
        self._prefill_tokens_per_s = 0.0
        self._decode_tokens_per_s = 0.0
        self._step_s = 0.0

    @property
    def role(self) -> str:
        """The role it has by its own last words; empty where it has not told."""
        return self._full.role if self._full is not None else ""

    def reset(self) -> None:
        """The process ended: nothing known of it holds any more."""
        self._full = None
        self._stats.clear()
        self._stats_at_s.clear()
        self._samples.clear()

    def polled(self, figures: Figures) -> None:
        """An answer of /v1/loads or /metrics came.

        A scheduler that hangs leaves its last figures in place: where they have not been written anew and show work,
        they keep their age. Those of an idle server stay true without being written."""
        now_s = self._clock.now_s()
        before = self._full
        again = before is not None and figures.written_s and figures.written_s == before.written_s
        if not again or _idle(figures):
            self._full_at_s = now_s
        self._full = figures
        self._sample(figures, now_s)

    def published(self, figures: Figures, rank: int = 0, ranks: int = 1) -> None:
        """A LoadStat of one of `ranks` data-parallel ranks came."""
        now_s = self._clock.now_s()
        self._stats[rank], self._stats_at_s[rank], self._stat_ranks = figures, now_s, ranks

    def load(self, role: str = "") -> ServerLoad | None:
        """The load now; None where nothing is known. role: what to report where the server has not told."""
        now_s = self._clock.now_s()
        full = self._full
        stat, stat_at_s = self._stat()
        if full is None and stat is None:
            return None
        self._rates(now_s)
        newest_s = max(self._full_at_s if full is not None else stat_at_s, stat_at_s if stat is not None else 0.0)
        figures = full or stat
        assert figures is not None
        role = figures.role or role
        prealloc, transferring = figures.prealloc or 0, figures.transferring or 0
        running, waiting = figures.running, figures.waiting
        if stat is not None and full is not None and stat_at_s > self._full_at_s:
            queued_elsewhere = prealloc + (
                transferring if role == "decode" else 0
            )  # a LoadStat counts all queues as one
            running, waiting = stat.running, max(0, stat.waiting - queued_elsewhere)
            figures = stat
        return ServerLoad(
            server=self._server,
            role=role,
            running=running,
            waiting=waiting,
            prealloc=prealloc,
            transferring=transferring,
            waiting_uncached_tokens=figures.waiting_uncached_tokens or 0,
            kv_tokens_used=figures.kv_tokens_used,
            kv_tokens_total=figures.kv_tokens_total,
            prefill_tokens_per_s=self._prefill_tokens_per_s,
            decode_tokens_per_s=self._decode_tokens_per_s,
            step_s=self._step_s,
            busy_fraction=self._busy_fraction(),
            age_s=max(0.0, now_s - newest_s),
        )

    def _stat(self) -> tuple[Figures | None, float]:
        """What all ranks published last, added up, and when the oldest of them did; none where ranks are missing."""
        if len(self._stats) < self._stat_ranks:
            return None, 0.0
        return add(self._stats.values()), min(self._stats_at_s.values())

    def _sample(self, figures: Figures, now_s: float) -> None:
        if figures.prefill_busy_s is None or figures.decode_busy_s is None:
            self._decode_tokens_per_s = figures.generated_tokens_per_s or self._decode_tokens_per_s
            return
        sample = _Sample(
            now_s,
            figures.prefill_tokens or 0,
            figures.prefill_busy_s,
            figures.decode_tokens or 0,
            figures.decode_steps or 0,
            figures.decode_busy_s,
        )
        last = self._samples[-1] if self._samples else None
        if last is not None and (
            sample.prefill_busy_s < last.prefill_busy_s or sample.decode_busy_s < last.decode_busy_s
        ):
            self._samples.clear()  # another process: its counters begin at 0
        self._samples.append(sample)

    def _rates(self, now_s: float) -> None:
        """Renew the rates from the samples of the window; where nothing was computed in it, the last ones hold."""
        while len(self._samples) > 2 and self._samples[1].at_s <= now_s - self._window_s:
            self._samples.popleft()
        if len(self._samples) < 2:
            return
        first, last = self._samples[0], self._samples[-1]
        prefill_s, decode_s = last.prefill_busy_s - first.prefill_busy_s, last.decode_busy_s - first.decode_busy_s
        if prefill_s > 0:
            self._prefill_tokens_per_s = (last.prefill_tokens - first.prefill_tokens) / prefill_s
        steps = last.decode_steps - first.decode_steps
        if decode_s > 0 and steps > 0:
            self._decode_tokens_per_s = (last.decode_tokens - first.decode_tokens) / decode_s
            self._step_s = decode_s / steps

    def _busy_fraction(self) -> float:
        if len(self._samples) < 2:
            return 0.0
        first, last = self._samples[0], self._samples[-1]
        busy_s = last.prefill_busy_s - first.prefill_busy_s + last.decode_busy_s - first.decode_busy_s
        available_s = (last.at_s - first.at_s) * (self._full.ranks if self._full is not None else 1)
        return min(1.0, busy_s / available_s) if available_s > 0 else 0.0


def _idle(figures: Figures) -> bool:
    queued = (figures.prealloc or 0) + (figures.transferring or 0) + (figures.waiting_uncached_tokens or 0)
    return figures.running + figures.waiting + queued == 0
