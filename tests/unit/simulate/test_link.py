"""The shared link."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.simulate.link import SharedLink, lossy_gbps

GB = 1e9


def finish(link: SharedLink, until_s: float = 1e6) -> dict[int, float]:
    """Run a link to its end: when each flow was done."""
    done: dict[int, float] = {}
    while (at_s := link.next_event_s()) < until_s:
        for key in link.advance(at_s):
            done[key] = at_s
    return done


def test_a_fast_link_exposes_only_the_state() -> None:
    link = SharedLink(80.0)  # 10 GB/s
    link.start(1, 5 * GB, 1 * GB, 2.0, 0.0)
    assert finish(link)[1] == pytest.approx(2.0 + 0.1)
    assert link.sent_bytes == pytest.approx(5 * GB, rel=1e-6)


def test_a_slow_link_is_busy_from_the_start() -> None:
    link = SharedLink(8.0)  # 1 GB/s
    link.start(1, 5 * GB, 1 * GB, 2.0, 0.0)
    assert finish(link)[1] == pytest.approx(5.0)


def test_flows_share_fairly() -> None:
    link = SharedLink(8.0)
    link.start(1, 2 * GB, 0, 0.1, 0.0)
    link.start(2, 4 * GB, 0, 0.1, 0.0)
    done = finish(link)
    assert done[1] == pytest.approx(4.0)
    assert done[2] == pytest.approx(6.0)


def test_what_one_flow_cannot_use_others_get() -> None:
    link = SharedLink(8.0)
    link.start(1, 1 * GB, 0, 10.0, 0.0)  # 0.1 GB/s
    link.start(2, 4.5 * GB, 0, 0.1, 0.0)
    done = finish(link)
    assert done[2] == pytest.approx(5.0, rel=1e-3)
    assert done[1] == pytest.approx(10.0, rel=1e-3)


def test_a_cut_stops_everything_until_it_is_back() -> None:
    link = SharedLink(8.0)
    link.start(1, 4 * GB, 0, 1.0, 0.0)
    link.advance(1.0)
    link.set_capacity(0.0, 2.0)
    assert link.next_event_s() == float("inf")
    assert link.backlog_bytes() == pytest.approx(2 * GB)
    link.set_capacity(8.0, 10.0)
    assert finish(link)[1] == pytest.approx(12.0)


def test_loss_costs_the_lost_bytes_and_slows_every_connection() -> None:
    assert lossy_gbps(100.0, 0.0, 0.02, 64) == 100.0
    assert lossy_gbps(100.0, 1e-9, 0.02, 64) == pytest.approx(100.0)
    # MSS / RTT * sqrt(3 / (2 p)) = 1448 / 0.02 * 12.25 bytes a second = 7.1 Mbps each
    assert lossy_gbps(100.0, 0.01, 0.02, 64) == pytest.approx(64 * 7.094e-3, rel=1e-3)
    assert lossy_gbps(0.1, 0.01, 0.02, 64) == pytest.approx(0.099), "a slow link: only the lost bytes count"
    link = SharedLink(8.0, rtt_s=0.0)
    link.start(1, 2 * GB, 0, 0.1, 0.0)
    link.set_loss(0.5, 0.0)
    assert finish(link)[1] == pytest.approx(4.0)


def test_a_dropped_flow_is_gone() -> None:
    link = SharedLink(8.0)
    link.start(1, 4 * GB, 0, 1.0, 0.0)
    link.drop(1, 0.5)
    assert finish(link) == {}
    assert link.backlog_bytes() == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 5), st.floats(0.01, 3), st.floats(0.05, 4), st.floats(0, 1)), min_size=1, max_size=12
    )
)
def test_every_byte_arrives_and_none_too_early(flows: list[tuple[float, float, float, float]]) -> None:
    link = SharedLink(8.0)
    done: dict[int, float] = {}
    total = 0.0
    for number, (start_s, gigabytes, prefill_s, state) in enumerate(sorted(flows)):
        while (at_s := link.next_event_s()) < start_s:
            done.update(dict.fromkeys(link.advance(at_s), at_s))
        link.start(number, gigabytes * GB, state * gigabytes * GB, prefill_s, start_s)
        total += gigabytes * GB
    done.update(finish(link))
    assert len(done) == len(flows)
    assert link.sent_bytes == pytest.approx(total, rel=1e-5)
    for number, (start_s, gigabytes, prefill_s, state) in enumerate(sorted(flows)):
        assert done[number] >= start_s + max(prefill_s + state * gigabytes, gigabytes) - 1e-4
