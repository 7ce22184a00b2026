"""What a router keeps of its agents' reports: order, restarts, gaps, ages; and the bytes they travel in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.monitor.reports import (
    Answer,
    Command,
    Drain,
    LinkLoad,
    ServerLoad,
    ServerState,
    SetLimits,
    SiteLoads,
    SiteState,
    Subscribe,
    SwitchRole,
    Undrain,
)
from sglang_prfaas.monitor.site_reports import SiteReports
from sglang_prfaas.monitor.wire import decode_report, decode_request, encode


def loads(sequence: int, epoch: int = 1, running: int = 0, age_s: float = 0.0, site: str = "pd") -> SiteLoads:
    return SiteLoads(
        site=site,
        epoch=epoch,
        sequence=sequence,
        servers=[ServerLoad(server="d0", role="decode", running=running, age_s=age_s)],
        links=[LinkLoad(from_site="prfaas", to_site="pd", used_bytes_per_s=5.0, age_s=age_s)],
    )


def state(sequence: int, epoch: int = 1, role: str = "decode") -> SiteState:
    server = ServerState(
        name="d0", role=role, state="ready", path="/servers/d0", bootstrap_host="", bootstrap_port=0, restarts=0
    )
    return SiteState(
        site="pd",
        name="pd",
        epoch=epoch,
        sequence=sequence,
        role="pd",
        model="m",
        served_model_name="m",
        draining=False,
        servers=[server],
    )


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(50.0)


@pytest.fixture
def reports(clock: VirtualClock) -> SiteReports:
    return SiteReports(clock, stale_after_s=3.0)


def test_the_newest_report_holds(reports: SiteReports) -> None:
    assert reports.accept(loads(1, running=1))
    assert reports.accept(loads(3, running=3))
    assert not reports.accept(loads(2, running=2)), "overtaken"
    assert not reports.accept(loads(3, running=9)), "twice"
    server = reports.server("pd", "d0")
    assert server is not None
    assert server.running == 3
    assert reports.counters()["pd"][0] == 1, "one was missing"


def test_an_age_is_the_senders_and_the_time_since(reports: SiteReports, clock: VirtualClock) -> None:
    reports.accept(loads(1, age_s=1.5))
    clock.advance(1.0)
    server, link = reports.server("pd", "d0"), reports.link("prfaas", "pd")
    assert server is not None
    assert link is not None
    assert (server.age_s, link.age_s) == (2.5, 2.5)


def test_stale_figures_are_not_given_out(reports: SiteReports, clock: VirtualClock) -> None:
    reports.accept(state(1))
    reports.accept(loads(2))
    clock.advance(3.0)
    assert reports.fresh("pd")
    assert reports.server("pd", "d0") is not None
    clock.advance(0.1)
    assert reports.server("pd", "d0") is None
    assert reports.link("prfaas", "pd") is None
    assert reports.links() == []
    assert not reports.fresh("pd")
    assert reports.state("pd") is not None, "which servers there are is known from elsewhere too"
    reports.accept(loads(3, age_s=4.0))
    assert reports.server("pd", "d0") is None, "old when it was sent"


def test_an_agent_that_was_restarted_starts_anew(reports: SiteReports) -> None:
    reports.accept(loads(700, epoch=8, running=5))
    reports.accept(state(701, epoch=8))
    assert reports.accept(state(1, epoch=3)), "a smaller number, of another epoch"
    assert reports.server("pd", "d0") is None, "nothing old holds"
    assert not reports.accept(state(1, epoch=3))
    assert reports.counters()["pd"][:2] == (0, 1)


def test_sites_do_not_mix(reports: SiteReports) -> None:
    reports.accept(loads(1, running=1))
    reports.accept(loads(1, running=2, site="east"))
    one, other = reports.server("pd", "d0"), reports.server("east", "d0")
    assert one is not None
    assert other is not None
    assert (one.running, other.running) == (1, 2)
    assert reports.server("pd", "d1") is None
    assert reports.server("west", "d0") is None
    assert not reports.fresh("west")


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20)), max_size=40))
def test_within_an_epoch_numbers_only_grow(sent: list[tuple[int, int]]) -> None:
    reports = SiteReports(VirtualClock(), 3.0)
    last: tuple[int, int] | None = None
    for epoch, sequence in sent:
        accepted = reports.accept(loads(sequence, epoch, running=sequence))
        assert accepted == (last is None or last[0] != epoch or sequence > last[1])
        if accepted:
            last = (epoch, sequence)
        server = reports.server("pd", "d0")
        assert server is not None
        assert last is not None
        assert server.running == last[1]


@pytest.mark.parametrize("report", [loads(1), state(2), Answer(id="a", done=False, message="no")])
def test_reports_travel(report: SiteLoads | SiteState | Answer) -> None:
    assert decode_report(encode(report)) == report


@pytest.mark.parametrize("action", [Drain("d"), Undrain("d"), SwitchRole("d", "prefill"), SetLimits("d", 4)])
def test_requests_travel(action: Drain | Undrain | SwitchRole | SetLimits) -> None:
    command = Command(id="x", deadline_s=3.0, action=action)
    assert decode_request(encode(command)) == command
    subscribe = Subscribe(router="r", version=1)
    assert decode_request(encode(subscribe)) == subscribe


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    for decode in (decode_report, decode_request):
        try:
            message = decode(data)
        except ProtocolError:
            continue
        assert decode(encode(message)) == message


def test_a_role_that_is_none_is_refused() -> None:
    with pytest.raises(ProtocolError, match="cook"):
        decode_request(encode(Command(id="x", deadline_s=1.0, action=SwitchRole("d", "cook"))))  # type: ignore[arg-type]
