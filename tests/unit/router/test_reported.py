"""From reports to what the scheduler looks at."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.schema import LinkConfig
from sglang_prfaas.monitor.reports import LinkLoad, ServerLoad
from sglang_prfaas.router.reported import (
    configured_link,
    is_scarce,
    measured_link,
    reported_decode_load,
    reported_wait_s,
)
from sglang_prfaas.scheduler.types import FULL

CONFIGURED = configured_link(LinkConfig(to_site="home", capacity_gbps=10.0, rtt_ms=20.0))


def test_waits_by_the_servers_own_speed_or_by_the_profile() -> None:
    assert reported_wait_s(ServerLoad(server="p", waiting=0, running=3), float) == 0.0
    queued = ServerLoad(server="p", waiting=4, waiting_uncached_tokens=8_000)
    assert reported_wait_s(queued, lambda tokens: tokens / 1_000) == pytest.approx(8.0)
    fast = ServerLoad(server="p", waiting=4, waiting_uncached_tokens=8_000, prefill_tokens_per_s=4_000.0)
    assert reported_wait_s(fast, float) == pytest.approx(2.0)


def test_decode_load_is_what_others_sent_and_what_waits_for_pages() -> None:
    load = ServerLoad(
        server="d", running=5, waiting=1, prealloc=2, transferring=1, kv_tokens_used=50, kv_tokens_total=100
    )
    assert reported_decode_load(load, 4, 1.0) == pytest.approx(5 + 2 + 0.5)
    assert reported_decode_load(load, 20, 1.0) == pytest.approx(2 + 0.5)
    assert reported_decode_load(load, 4, 0.5) >= FULL
    assert reported_decode_load(ServerLoad(server="d"), 0, 0.5) == 0.0


def test_links() -> None:
    assert CONFIGURED.bytes_per_s == CONFIGURED.free_bytes_per_s == 1.25e9
    assert CONFIGURED.rtt_s == 0.02
    assert not CONFIGURED.measured
    half = LinkLoad(from_site="far", to_site="home", used_bytes_per_s=5e8, capacity_bytes_per_s=1e9, backlog_bytes=1000)
    seen = measured_link(half, CONFIGURED)
    assert (seen.bytes_per_s, seen.free_bytes_per_s, seen.backlog_bytes, seen.rtt_s) == (1e9, 5e8, 1000.0, 0.02)
    assert seen.measured
    assert seen.wait_s == pytest.approx(1e-6)
    full = LinkLoad(from_site="far", to_site="home", used_bytes_per_s=3e8, capacity_bytes_per_s=1e9, congested=True)
    assert measured_link(full, CONFIGURED).bytes_per_s == 3e8, "what it carries now"
    unknown = LinkLoad(from_site="far", to_site="home", used_bytes_per_s=1e8)
    assert measured_link(unknown, CONFIGURED).bytes_per_s == 1.25e9


def test_scarce() -> None:
    def used(rate: float, *, congested: bool = False) -> LinkLoad:
        return LinkLoad(
            from_site="far", to_site="home", used_bytes_per_s=rate, capacity_bytes_per_s=1e9, congested=congested
        )

    assert not is_scarce(used(8e8), 0.9)
    assert is_scarce(used(9e8), 0.9)
    assert is_scarce(used(0.0, congested=True), 0.9)
