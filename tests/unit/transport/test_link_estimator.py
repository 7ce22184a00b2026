"""The link estimator on traces of a simulated link: a queue, a wire, and connections that fill it or do not."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.transport.link_estimator import (
    CLEAR_S,
    CONFIRM_S,
    ConnectionSample,
    LinkEstimator,
    LinkFigures,
    Verdict,
)

MSS = 1448
STEP_S = 0.1


class SimulatedLink:
    """A wire of a rate behind a queue; connections that share it evenly, and a competing flow."""

    def __init__(self, bytes_per_s: float, rtt_s: float = 0.02, connections: int = 4) -> None:
        self.bytes_per_s, self.rtt_s = bytes_per_s, rtt_s
        self.connections = connections
        self.now_s = 0.0
        self.acked = [0.0] * connections
        self.segments = [0.0] * connections
        self.again = [0.0] * connections
        self.busy_s = [0.0] * connections
        self.queue_s = 0.0
        self.competing = 0.0
        self.loss = 0.0

    def run(
        self, estimator: LinkEstimator, seconds: float, offered: float = float("inf"), backlog_bytes: int = 0
    ) -> list[LinkFigures]:
        """Look every 0.1 s. `offered`: bytes/s that the mover has; more than the wire's rate fills it."""
        found = []
        for _ in range(round(seconds / STEP_S)):
            free = self.bytes_per_s * (1.0 - self.competing)
            rate = min(offered, free)
            filled = offered >= free
            self.now_s += STEP_S
            for i in range(self.connections):
                moved = rate * STEP_S / self.connections
                self.acked[i] += moved
                self.segments[i] += moved / MSS
                self.again[i] += self.loss * moved / MSS
                self.busy_s[i] += STEP_S if filled else STEP_S / 2
            samples = [
                ConnectionSample(
                    key=i,
                    acked_bytes=int(self.acked[i]),
                    sent_segments=int(self.segments[i]),
                    retransmitted_segments=int(self.again[i]),
                    rtt_s=self.rtt_s + self.queue_s,
                    min_rtt_s=self.rtt_s,
                    notsent_bytes=1 << 16 if filled else 0,
                    app_limited=not filled,
                    busy_s=self.busy_s[i],
                )
                for i in range(self.connections)
            ]
            found.append(estimator.look(self.now_s, samples, backlog_bytes))
        return found


def test_until_measured_the_link_is_as_configured() -> None:
    estimator = LinkEstimator(125e6, 0.03)
    assert estimator.figures == LinkFigures(capacity_bytes_per_s=125e6, rtt_s=0.03)
    (figures,) = SimulatedLink(1e9, 0.02).run(estimator, 0.1, offered=0.0)
    assert (figures.capacity_bytes_per_s, figures.used_bytes_per_s, figures.congested) == (125e6, 0.0, False)


def test_a_filled_link_shows_its_capacity() -> None:
    estimator = LinkEstimator(1e9)
    figures = SimulatedLink(125e6).run(estimator, 1.0)[-1]
    assert figures.filled
    assert figures.used_bytes_per_s == pytest.approx(125e6, rel=0.02)
    assert figures.capacity_bytes_per_s == pytest.approx(125e6, rel=0.02)
    assert figures.connections == 4


def test_traffic_that_does_not_fill_the_link_says_nothing_of_its_capacity() -> None:
    estimator = LinkEstimator(125e6)
    figures = SimulatedLink(125e6).run(estimator, 3.0, offered=10e6)[-1]
    assert not figures.filled
    assert figures.used_bytes_per_s == pytest.approx(10e6, rel=0.02)
    assert figures.capacity_bytes_per_s == 125e6


def test_more_than_was_configured_counts_at_once() -> None:
    estimator = LinkEstimator(10e6)
    figures = SimulatedLink(125e6).run(estimator, 1.0, offered=50e6)[-1]
    assert figures.capacity_bytes_per_s == pytest.approx(50e6, rel=0.02)


def test_a_drop_is_noticed_within_a_second_and_the_return_too() -> None:
    estimator = LinkEstimator(125e6)
    link = SimulatedLink(125e6)
    link.run(estimator, 5.0)
    link.bytes_per_s = 25e6
    assert link.run(estimator, 1.0)[-1].capacity_bytes_per_s == pytest.approx(25e6, rel=0.05)
    link.bytes_per_s = 125e6
    assert link.run(estimator, 1.0)[-1].capacity_bytes_per_s == pytest.approx(125e6, rel=0.05)


def test_a_drop_is_not_undone_by_what_was_carried_before() -> None:
    estimator = LinkEstimator(125e6)
    link = SimulatedLink(125e6)
    link.run(estimator, 5.0)
    link.bytes_per_s = 25e6
    link.run(estimator, 1.0)
    assert link.run(estimator, 0.5, offered=1e6)[-1].capacity_bytes_per_s == pytest.approx(25e6, rel=0.05)


def test_competing_traffic_leaves_less() -> None:
    estimator = LinkEstimator(125e6)
    link = SimulatedLink(125e6)
    link.run(estimator, 2.0)
    link.competing = 0.5
    figures = link.run(estimator, 1.0)[-1]
    assert figures.capacity_bytes_per_s == pytest.approx(62.5e6, rel=0.05)


def test_an_old_measurement_goes_back_to_the_configured_capacity() -> None:
    estimator = LinkEstimator(125e6)
    link = SimulatedLink(25e6)
    link.run(estimator, 2.0)
    assert link.run(estimator, 4.5, offered=0.0)[-1].capacity_bytes_per_s == pytest.approx(25e6, rel=0.02), "held"
    after = link.run(estimator, 10.5, offered=0.0)[-1].capacity_bytes_per_s
    assert after == pytest.approx(75e6, rel=0.05), "half of the way"
    unknown = LinkEstimator()
    link = SimulatedLink(25e6)
    link.run(unknown, 2.0)
    assert link.run(unknown, 4.5, offered=0.0)[-1].capacity_bytes_per_s == pytest.approx(25e6, rel=0.02), "held"


def test_a_link_that_was_slow_and_is_not_used_any_more_is_tried_again() -> None:
    """Nothing is configured, and nobody sends over it since it got slow: only time can tell."""
    unknown = LinkEstimator()
    link = SimulatedLink(125e6)
    link.run(unknown, 2.0)
    link.bytes_per_s = 2.5e6
    assert link.run(unknown, 3.0)[-1].capacity_bytes_per_s == pytest.approx(2.5e6, rel=0.05)
    idle = link.run(unknown, 25.0, offered=0.0)[-1]
    assert not idle.congested
    assert idle.capacity_bytes_per_s > 0.7 * 125e6


def test_a_receiver_that_is_too_slow_is_not_the_link() -> None:
    estimator = LinkEstimator(125e6)
    for i in range(20):
        sample = ConnectionSample(
            key=0,
            acked_bytes=i * 100_000,
            notsent_bytes=1 << 20,
            app_limited=False,
            busy_s=i * STEP_S,
            held_back_s=i * STEP_S / 2,
        )
        figures = estimator.look(i * STEP_S, [sample], 0)
    assert not figures.filled
    assert figures.capacity_bytes_per_s == 125e6


@pytest.mark.parametrize("signal", ["delay", "loss", "backlog"])
def test_each_signal_is_noticed_and_ends(signal: str) -> None:
    estimator = LinkEstimator(125e6)
    link = SimulatedLink(125e6)
    assert not link.run(estimator, 2.0)[-1].congested, "a filled link without a queue"
    if signal == "delay":
        link.queue_s = 0.04
    elif signal == "loss":
        link.loss = 0.05
    backlog = round(2 * 125e6) if signal == "backlog" else 0
    seen = link.run(estimator, 0.8, backlog_bytes=backlog)
    assert next(i for i, figures in enumerate(seen) if figures.congested) <= 4, "within half a second"
    assert seen[-1].reason == signal
    link.queue_s = link.loss = 0.0
    assert link.run(estimator, CLEAR_S, offered=50e6)[-1].congested
    figures = link.run(estimator, 1.0, offered=50e6)[-1]
    assert (figures.congested, figures.reason) == (False, "")


def test_a_growing_backlog_is_noticed_earlier_than_a_standing_one() -> None:
    standing, growing = LinkEstimator(125e6), LinkEstimator(125e6)
    link = SimulatedLink(125e6)
    assert not link.run(standing, 2.0, backlog_bytes=round(0.5 * 125e6))[-1].congested
    link = SimulatedLink(125e6)
    found = [link.run(growing, STEP_S, backlog_bytes=round(0.5 * STEP_S * i * 125e6))[-1] for i in range(12)]
    assert found[-1].reason == "backlog"
    assert not found[3].congested


def test_a_flicker_is_no_verdict() -> None:
    verdict = Verdict()
    for i in range(100):
        verdict.look(i * STEP_S, {"delay": 1.5 if i % 2 else 0.1, "loss": 0.0})
        assert not verdict.congested
    verdict.look(10.0, {"delay": 2.0, "loss": 0.0})
    verdict.look(10.0 + CONFIRM_S, {"delay": 2.0, "loss": 0.0})
    assert verdict.congested
    for i in range(100):
        verdict.look(11.0 + i * STEP_S, {"delay": 0.7 if i % 2 else 0.1, "loss": 0.0})
        assert verdict.congested, "between the two limits nothing changes"


def test_looks_at_one_time_and_connections_that_come_and_go() -> None:
    estimator = LinkEstimator()
    one = ConnectionSample(key=1, acked_bytes=1000)
    before = estimator.look(0.0, [one], 0)
    assert estimator.look(0.0, [ConnectionSample(key=1, acked_bytes=9000)], 0) == before
    figures = estimator.look(0.1, [one, ConnectionSample(key=2, acked_bytes=500)], 0)
    assert figures.used_bytes_per_s == pytest.approx(5000.0), "a new one counts from its start"
    assert estimator.look(0.2, [], 0).connections == 0


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.floats(0.0, 2.0),
            st.lists(
                st.builds(
                    ConnectionSample,
                    key=st.integers(0, 3),
                    acked_bytes=st.integers(0, 1 << 40),
                    sent_segments=st.integers(0, 1 << 30),
                    retransmitted_segments=st.integers(0, 1 << 31),
                    rtt_s=st.floats(0.0, 10.0),
                    min_rtt_s=st.floats(0.0, 10.0),
                    notsent_bytes=st.integers(0, 1 << 30),
                    app_limited=st.booleans(),
                    busy_s=st.floats(0.0, 1e6),
                    held_back_s=st.floats(0.0, 1e6),
                ),
                max_size=4,
            ),
            st.integers(0, 1 << 45),
        ),
        max_size=40,
    ),
    configured=st.sampled_from([0.0, 1.0, 125e6]),
)
def test_whatever_is_seen_the_figures_make_sense(
    steps: list[tuple[float, list[ConnectionSample], int]], configured: float
) -> None:
    estimator = LinkEstimator(configured)
    now_s = 0.0
    for duration_s, samples, backlog in steps:
        now_s += duration_s
        figures = estimator.look(now_s, samples, backlog)
        assert figures.used_bytes_per_s >= 0
        assert figures.capacity_bytes_per_s >= 0
        assert 0 <= figures.loss_fraction <= 1
        assert figures.queueing_delay_s >= 0
        assert bool(figures.reason) == figures.congested


@settings(max_examples=40, deadline=None)
@given(
    bytes_per_s=st.floats(1e6, 1e10),
    connections=st.integers(1, 16),
    shares=st.lists(st.floats(0.05, 0.9), min_size=1, max_size=5),
)
def test_the_capacity_is_that_of_the_wire_whatever_was_offered(
    bytes_per_s: float, connections: int, shares: list[float]
) -> None:
    estimator = LinkEstimator()
    link = SimulatedLink(bytes_per_s, connections=connections)
    link.run(estimator, 1.0)
    for share in shares:
        figures = link.run(estimator, 0.7, offered=share * bytes_per_s)[-1]
        assert figures.capacity_bytes_per_s == pytest.approx(bytes_per_s, rel=0.02)
        assert figures.used_bytes_per_s == pytest.approx(share * bytes_per_s, rel=0.05)
