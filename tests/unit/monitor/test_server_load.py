"""A server's load over time: rates, ages, restarts, and what two sources say together."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.monitor.reports import ServerLoad
from sglang_prfaas.monitor.server_load import ServerLoadTracker
from sglang_prfaas.monitor.sglang_loads import Figures, parse_loads

RECORDED = Path(__file__).with_name("recorded")


class Watched:
    def __init__(self, window_s: float = 10.0) -> None:
        self.clock = VirtualClock()
        self.tracker = ServerLoadTracker("s", self.clock, window_s=window_s)

    def polled(self, after_s: float = 0.0, **values: object) -> ServerLoad:
        """An answer comes; it is written anew unless `written_s` says otherwise."""
        self.clock.advance(after_s)
        self.tracker.polled(figures(**{"written_s": 1000.0 + self.clock.now_s(), **values}))
        return self.load()

    def load(self) -> ServerLoad:
        load = self.tracker.load()
        assert load is not None
        return load


def figures(**values: object) -> Figures:
    base: dict[str, object] = {
        "role": "decode",
        "running": 0,
        "waiting": 0,
        "prealloc": 0,
        "transferring": 0,
        "waiting_uncached_tokens": 0,
        "kv_tokens_used": 0,
        "kv_tokens_total": 1000,
        "prefill_tokens": 0,
        "prefill_busy_s": 0.0,
        "decode_tokens": 0.0,
        "decode_steps": 0.0,
        "decode_busy_s": 0.0,
    }
    return msgspec.convert({**base, **values}, Figures)


def test_rates_of_a_recording() -> None:
    watched = Watched()
    for line in (RECORDED / "loads_decode.jsonl").read_text().splitlines():
        row = json.loads(line)
        watched.clock.advance(row["at_s"] - watched.clock.now_s() if row["at_s"] > watched.clock.now_s() else 0)
        watched.tracker.polled(parse_loads(row["body"].encode()))
    load = watched.load()
    assert load.role == "decode"
    assert load.decode_tokens_per_s == pytest.approx(143.8, abs=0.1)
    assert load.step_s == pytest.approx(0.0381, abs=1e-4)
    assert 0.8 < load.busy_fraction < 0.9


def test_nothing_known_is_no_load() -> None:
    watched = Watched()
    assert watched.tracker.load() is None
    watched.polled(running=3)
    watched.tracker.reset()
    assert watched.tracker.load("prefill") is None


def test_prefill_speed_is_that_of_busy_seconds_and_stays_while_it_rests() -> None:
    watched = Watched()
    watched.polled(role="prefill")
    load = watched.polled(5.0, role="prefill", prefill_tokens=3000, prefill_busy_s=2.0)
    assert (load.prefill_tokens_per_s, load.busy_fraction) == (1500.0, 0.4)
    for _ in range(5):
        load = watched.polled(10.0, role="prefill", prefill_tokens=3000, prefill_busy_s=2.0)
    assert (load.prefill_tokens_per_s, load.busy_fraction) == (1500.0, 0.0)


def test_old_speeds_leave_the_window() -> None:
    watched = Watched(window_s=4.0)
    for second in range(1, 11):
        watched.polled(1.0, prefill_tokens=1000 * second, prefill_busy_s=float(second))
    for second in range(1, 11):
        load = watched.polled(1.0, prefill_tokens=10_000 + 100 * second, prefill_busy_s=10.0 + second)
    assert load.prefill_tokens_per_s == pytest.approx(100.0)


def test_a_restarted_process_counts_from_zero() -> None:
    watched = Watched()
    watched.polled(decode_tokens=5000.0, decode_steps=100.0, decode_busy_s=50.0)
    load = watched.polled(1.0, decode_tokens=10.0, decode_steps=10.0, decode_busy_s=0.5)
    assert load.decode_tokens_per_s == 0.0
    load = watched.polled(1.0, decode_tokens=30.0, decode_steps=20.0, decode_busy_s=1.0)
    assert load.decode_tokens_per_s == pytest.approx(40.0)
    assert load.step_s == pytest.approx(0.05)


def test_figures_of_a_scheduler_that_hangs_grow_old() -> None:
    watched = Watched()
    watched.polled(running=2, written_s=77.0)
    assert watched.polled(4.0, running=2, written_s=77.0).age_s == pytest.approx(4.0)
    assert watched.polled(1.0, running=2, written_s=78.0).age_s == 0.0


def test_figures_of_an_idle_server_stay_true() -> None:
    watched = Watched()
    watched.polled(written_s=77.0)
    assert watched.polled(60.0, written_s=77.0).age_s == 0.0
    watched.clock.advance(3.0)
    assert watched.load().age_s == pytest.approx(3.0), "but only as long as it answers"


def test_a_load_stat_is_newer_than_the_last_answer() -> None:
    watched = Watched()
    watched.polled(running=1, waiting=1, prealloc=2, transferring=3)
    watched.clock.advance(0.2)
    watched.tracker.published(figures(role="", running=4, waiting=7, kv_tokens_used=500))
    load = watched.load()
    assert (load.running, load.waiting, load.prealloc, load.transferring) == (4, 2, 2, 3)
    assert (load.kv_tokens_used, load.age_s, load.role) == (500, 0.0, "decode")
    assert load.requests == 11
    load = watched.polled(0.2, running=5)
    assert (load.running, load.waiting) == (5, 0), "the newest answer has the last word"


def test_load_stats_count_once_every_rank_has_sent_one() -> None:
    watched = Watched()
    watched.tracker.published(figures(running=1), rank=0, ranks=2)
    assert watched.tracker.load() is None
    watched.clock.advance(1.0)
    watched.tracker.published(figures(running=2), rank=1, ranks=2)
    assert watched.load().running == 3
    assert watched.load().age_s == pytest.approx(1.0), "as old as its oldest part"


def test_idle() -> None:
    watched = Watched()
    assert watched.polled().idle
    assert not watched.polled(waiting_uncached_tokens=5).idle
    assert not watched.polled(transferring=1).idle


def test_metrics_give_the_throughput_they_have() -> None:
    watched = Watched()
    load = watched.polled(prefill_busy_s=None, decode_busy_s=None, generated_tokens_per_s=176.0)
    assert load.decode_tokens_per_s == 176.0
