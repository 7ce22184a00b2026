"""Movers' views of links: put together, forgotten, and sent over a real Unix socket."""

from __future__ import annotations

import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from sglang_prfaas.clock import MonotonicClock, VirtualClock
from sglang_prfaas.monitor.link_channel import LinkReceiver, LinkSender, LinkView, LinkViews, merge, new_endpoint
from sglang_prfaas.monitor.reports import LinkLoad

DEADLINE_S = 30.0


def link(used: float = 0.0, **values: float) -> LinkLoad:
    return LinkLoad(from_site="prfaas", to_site="pd", used_bytes_per_s=used, **values)  # type: ignore[arg-type]


def test_views_are_put_together() -> None:
    merged = merge(
        [
            link(300.0, capacity_bytes_per_s=1000.0, loss_fraction=0.02, rtt_s=0.03, min_rtt_s=0.02, connections=4),
            link(100.0, backlog_bytes=7, loss_fraction=0.06, rtt_s=0.07, min_rtt_s=0.03, connections=2, age_s=0.5),
        ]
    )
    assert (merged.used_bytes_per_s, merged.backlog_bytes, merged.connections) == (400.0, 7, 6)
    assert merged.capacity_bytes_per_s == 1000.0
    assert merged.loss_fraction == pytest.approx(0.03), "weighted by traffic"
    assert merged.rtt_s == pytest.approx(0.04)
    assert (merged.min_rtt_s, merged.age_s) == (0.02, 0.0)
    assert merged.available_bytes_per_s == 600.0
    assert merged.queueing_delay_s == pytest.approx(0.02)


def test_an_idle_link_has_the_configured_capacity_and_a_plain_mean() -> None:
    merged = merge([link(rtt_s=0.02, min_rtt_s=0.02), link(rtt_s=0.04, min_rtt_s=0.03), link()], 5e9)
    assert merged.capacity_bytes_per_s == 5e9
    assert merged.rtt_s == pytest.approx(0.03), "a mover without a measurement does not count"


def test_movers_that_fill_a_link_together_show_its_capacity() -> None:
    clock = VirtualClock()
    views = LinkViews(clock, configured_bytes_per_s={"pd": 1000.0})
    for mover in ("s/0", "s/1"):
        views.seen(LinkView(mover, link(300.0, capacity_bytes_per_s=300.0, filled=True)))
    (load,) = views.links()
    assert (load.capacity_bytes_per_s, load.available_bytes_per_s, load.filled) == (600.0, 0.0, True)
    clock.advance(1.0)
    for mover in ("s/0", "s/1"):
        views.seen(LinkView(mover, link(10.0, capacity_bytes_per_s=300.0)))
    (load,) = views.links()
    assert load.available_bytes_per_s == 580.0, "what they filled it with, though each knows of half only"
    clock.advance(5.5)
    views.seen(LinkView("s/1", link(20.0, capacity_bytes_per_s=300.0)))
    (load,) = views.links()
    assert load.capacity_bytes_per_s == 300.0, "one mover is left: its own figures count"


def test_one_congested_mover_is_enough() -> None:
    merged = merge([link(1.0), LinkLoad(from_site="prfaas", to_site="pd", congested=True, congestion="delay")])
    assert (merged.congested, merged.congestion) == (True, "delay")


def test_silent_movers_are_forgotten() -> None:
    clock = VirtualClock()
    views = LinkViews(clock, configured_bytes_per_s={"pd": 100.0}, silent_after_s=5.0)
    views.seen(LinkView("s/0", link(1.0)))
    clock.advance(3.0)
    views.seen(LinkView("s/1", link(2.0)))
    views.seen(LinkView("s/1", link(4.0)))
    (load,) = views.links()
    assert (load.used_bytes_per_s, load.capacity_bytes_per_s) == (5.0, 100.0)
    clock.advance(3.0)
    (load,) = views.links()
    assert (load.used_bytes_per_s, load.age_s) == (4.0, 3.0)
    clock.advance(3.0)
    assert views.links() == []


@pytest.fixture
def receiver() -> Iterator[tuple[LinkReceiver, str]]:
    endpoint = new_endpoint()
    receiver = LinkReceiver(endpoint)
    yield receiver, endpoint
    receiver.close()
    assert not Path(endpoint.removeprefix("ipc://")).parent.exists()


def test_over_a_socket(receiver: tuple[LinkReceiver, str]) -> None:
    end, endpoint = receiver
    assert stat.S_IMODE(Path(endpoint.removeprefix("ipc://")).parent.stat().st_mode) == 0o700
    views = LinkViews(MonotonicClock(), configured_bytes_per_s={})
    senders = [LinkSender(endpoint, f"s/{rank}") for rank in range(3)]
    context = zmq.Context()
    stranger = context.socket(zmq.PUSH)
    stranger.connect(endpoint)
    try:
        for rank, sender in enumerate(senders):
            assert sender.send(link(10.0 * (rank + 1)))
        stranger.send(b"no message")
        taken, deadline = 0, time.monotonic() + DEADLINE_S
        while taken < 4:
            taken += end.drain(views)
            assert time.monotonic() < deadline, f"{taken} messages came"
        assert end.refused == 1
        assert [load.used_bytes_per_s for load in views.links()] == [60.0]
    finally:
        for sender in senders:
            sender.close()
        stranger.close(linger=0)
        context.term()


def test_a_sender_without_an_agent_does_not_wait() -> None:
    sender = LinkSender(new_endpoint(), "s/0")
    began = time.monotonic()
    sent = [sender.send(link(1.0)) for _ in range(1000)]
    assert not all(sent)
    assert time.monotonic() - began < DEADLINE_S
    sender.close()
