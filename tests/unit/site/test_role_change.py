"""Draining and changing roles: the state machine in words and under any sequence of events, and the rules."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.config.schema import SiteLimits
from sglang_prfaas.site.role_change import Do, Outcome, Phase, RoleChange, Seen, Standing, refusal
from sglang_prfaas.site.role_switch import outcome_of

LIMITS = SiteLimits(role_switch_timeout_s=20)
DRAIN_S = 60.0


class Change:
    """A change from prefill to decode, or a drain, with its clock and what is seen of the server."""

    def __init__(self, new_role: str = "decode") -> None:
        self.clock = VirtualClock()
        self.machine = RoleChange("s", "prefill", new_role, DRAIN_S, LIMITS, self.clock)
        self.seen = Seen(requests=3, relayed=2, role="prefill", ready=True)

    def step(self, after_s: float = 0.0, **seen: object) -> Do:
        self.clock.advance(after_s)
        self.seen = msgspec.structs.replace(self.seen, **seen)
        return self.machine.step(self.seen)

    def to_checking(self) -> None:
        assert self.step(requests=0, relayed=0) is Do.SWITCH
        assert self.machine.switched(Outcome.DONE, "ok") is Do.WAIT
        assert self.phase == "checking"

    @property
    def phase(self) -> str:
        return str(self.machine.phase)

    def accepts(self) -> bool:
        return self.machine.accepts


def test_drained_then_switched_then_checked() -> None:
    change = Change()
    assert change.step() is Do.WAIT
    assert change.accepts(), "what was on its way is still taken"
    assert change.step(requests=0) is Do.WAIT, "one is still being relayed"
    assert change.step(requests=None, relayed=0) is Do.WAIT, "its figures are older than the drain"
    assert change.step(requests=0) is Do.SWITCH
    assert not change.accepts()
    change.machine.switched(Outcome.DONE, "ok")
    assert change.step(ready=False) is Do.WAIT
    assert change.step(ready=True) is Do.WAIT, "it still says prefill"
    assert change.step(role="decode") is Do.WAIT
    assert change.phase == Phase.DONE
    assert change.machine.reason == ""


def test_a_drain_ends_without_requests_and_stays() -> None:
    change = Change("")
    change.step(requests=0, relayed=0)
    assert change.phase == Phase.DRAINED
    change.step(10 * DRAIN_S, requests=5)
    assert change.phase == Phase.DRAINED
    assert not change.accepts()


def test_requests_that_do_not_end_in_time() -> None:
    change = Change()
    assert change.step(DRAIN_S) is Do.WAIT
    assert change.phase == Phase.FAILED
    assert change.machine.reason == "not without requests after 60 s: 3 requests left"


def test_busy_drains_on_until_the_deadline() -> None:
    change = Change()
    assert change.step(requests=0, relayed=0) is Do.SWITCH
    change.machine.switched(Outcome.BUSY, "not idle")
    assert change.phase == Phase.DRAINING
    assert change.step(DRAIN_S) is Do.SWITCH
    change.machine.switched(Outcome.BUSY, "not idle")
    assert (change.phase, change.machine.reason) == (Phase.FAILED, "not idle")


def test_a_refusal_leaves_it_as_it_was() -> None:
    change = Change()
    change.step(requests=0, relayed=0)
    assert change.machine.switched(Outcome.REFUSED, "no headroom") is Do.WAIT
    assert (change.phase, change.machine.reason) == (Phase.FAILED, "no headroom")


def test_not_healthy_in_the_new_role_is_switched_back() -> None:
    change = Change()
    change.to_checking()
    assert change.step(19, role="decode", ready=False) is Do.WAIT
    assert change.step(1) is Do.SWITCH_BACK
    assert change.machine.switched(Outcome.DONE, "ok") is Do.WAIT
    assert change.step(role="prefill") is Do.WAIT
    assert change.step(ready=True) is Do.WAIT
    assert change.phase == Phase.FAILED
    assert change.machine.reason == "not healthy as decode within 20 s; it was made prefill again"


def test_a_switch_back_that_fails_restarts_it() -> None:
    change = Change()
    change.to_checking()
    assert change.step(20, role="decode", ready=False) is Do.SWITCH_BACK
    assert change.machine.switched(Outcome.BROKEN, "restart required") is Do.RESTART
    assert change.step(ready=True) is Do.WAIT, "it has not gone yet"
    assert change.step(ready=False) is Do.WAIT
    assert change.phase == Phase.RESTARTING
    change.step(ready=True, role="prefill")
    assert change.phase == Phase.FAILED
    assert change.machine.reason == "not healthy as decode within 20 s; restart required; it was restarted as prefill"


def test_a_switch_back_without_health_restarts_it() -> None:
    change = Change()
    change.to_checking()
    change.step(20, role="decode", ready=False)
    change.machine.switched(Outcome.DONE, "ok")
    assert change.step(20) is Do.RESTART
    assert change.phase == Phase.RESTARTING


def test_a_broken_switch_restarts_it_at_once() -> None:
    change = Change()
    change.step(requests=0, relayed=0)
    assert change.machine.switched(Outcome.BROKEN, "restart required") is Do.RESTART


@pytest.mark.parametrize(("role", "phase"), [("decode", Phase.DONE), ("prefill", Phase.CHECKING)])
def test_no_answer_is_looked_into(role: str, phase: Phase) -> None:
    change = Change()
    change.step(requests=0, relayed=0)
    change.machine.switched(Outcome.UNKNOWN, "connection lost")
    change.step(role=role, ready=True)
    assert change.phase == phase
    change.step(20)
    assert change.phase in (Phase.DONE, Phase.FAILED)
    assert change.machine.reason == ("" if role == "decode" else "connection lost")


def test_a_process_that_dies_ends_it() -> None:
    change = Change()
    change.machine.lost("its process ended")
    assert (change.phase, change.machine.reason) == (Phase.FAILED, "its process ended")
    change.machine.lost("again")
    assert change.machine.reason == "its process ended"


SEEN = st.builds(
    Seen,
    requests=st.none() | st.integers(0, 2),
    relayed=st.integers(0, 1),
    role=st.sampled_from(["prefill", "decode"]),
    ready=st.booleans(),
)


@given(
    st.sampled_from(["decode", ""]), st.lists(st.tuples(st.floats(0, 40), SEEN, st.sampled_from(Outcome)), max_size=60)
)
def test_any_course(new_role: str, course: list[tuple[float, Seen, Outcome]]) -> None:
    """Never switched with a request in it; done only where it was seen healthy in the new role; it always ends."""
    change = Change(new_role)
    machine = change.machine
    for after_s, seen, outcome in course:
        change.clock.advance(after_s)
        before = machine.phase
        do = machine.step(seen)
        if do is Do.SWITCH:
            assert before is Phase.DRAINING
            assert (seen.requests, seen.relayed, new_role) == (0, 0, "decode")
        if machine.phase is Phase.DONE and before is not Phase.DONE:
            assert before is Phase.CHECKING
            assert seen.ready
            assert seen.role == "decode"
        if before in (Phase.DONE, Phase.FAILED, Phase.DRAINED):
            assert do is Do.WAIT
            assert machine.phase is before
        while do in (Do.SWITCH, Do.SWITCH_BACK):
            do = machine.switched(outcome, "message")
    for _ in range(8):  # enough for every phase's deadline, with a server that behaves
        change.clock.advance(100.0)
        do = machine.step(Seen(requests=0, relayed=0, role="prefill", ready=machine.phase is not Phase.RESTARTING))
        if do in (Do.SWITCH, Do.SWITCH_BACK):
            machine.switched(Outcome.REFUSED, "no")
        machine.step(Seen(requests=0, relayed=0, role="prefill", ready=True))
    assert machine.phase in (Phase.DONE, Phase.FAILED, Phase.DRAINED)
    assert (machine.phase is Phase.FAILED) == bool(machine.reason)


# --- rules ------------------------------------------------------------------------------------------------------------

PD = [
    Standing("p0", "prefill", True, True),
    Standing("p1", "prefill", True, True),
    Standing("d0", "decode", True, True),
    Standing("d1", "decode", False, True),
    Standing("old", "prefill", True, False),
]


@pytest.mark.parametrize(
    ("name", "role", "busy", "expected"),
    [
        ("p0", "decode", "", ""),
        ("p0", "", "", ""),
        ("p0", "prefill", "", ""),
        ("nobody", "decode", "", "no such server; the site has p0, p1, d0, d1, old"),
        ("p0", "decode", "p1", "server p1 is being drained or changed; one at a time"),
        ("d1", "prefill", "", "it is not ready"),
        ("old", "decode", "", "it cannot change its role; start it with --enable-pd-role-switch"),
        ("d0", "prefill", "", "0 other decode servers would stay available, limits.min_decode_servers is 1"),
        ("d0", "", "", "0 other decode servers would stay available, limits.min_decode_servers is 1"),
    ],
)
def test_rules(name: str, role: str, busy: str, expected: str) -> None:
    assert refusal(PD, name, role, "pd", LIMITS, busy) == expected


def test_a_prfaas_site_only_prefills() -> None:
    assert refusal(PD[:2], "p0", "decode", "prfaas", LIMITS, "") == "a prfaas site has no decode servers"


def test_how_many_must_stay_is_configured() -> None:
    none = SiteLimits(min_prefill_servers=0)
    three = SiteLimits(min_prefill_servers=3)
    assert refusal(PD[:1], "p0", "decode", "pd", none, "") == ""
    assert "min_prefill_servers is 3" in refusal(PD, "p0", "decode", "pd", three, "")


@pytest.mark.parametrize(
    ("status", "body", "outcome"),
    [
        (200, b'{"success":true,"message":"ok","old_role":"prefill","new_role":"decode"}', Outcome.DONE),
        (400, b'{"success":false,"message":"instance is not idle; drain","safe_to_restore":true}', Outcome.BUSY),
        (400, b'{"success":false,"message":"insufficient headroom","safe_to_restore":true}', Outcome.REFUSED),
        (400, b'{"success":false,"message":"restart required","safe_to_restore":false}', Outcome.BROKEN),
        (404, b"not found", Outcome.REFUSED),
        (500, b"oops", Outcome.UNKNOWN),
    ],
)
def test_what_a_server_answers(status: int, body: bytes, outcome: Outcome) -> None:
    assert outcome_of(status, body)[0] is outcome
