"""Role changes: when they pay, and when they do not."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.config.schema import RolesConfig
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.lengths import nodes
from sglang_prfaas.scheduler.long_term import RoleCommand, RoleObservation, RolePolicy, RoleServer
from sglang_prfaas.scheduler.role_capacity import MeasuredCapacity, PdLoad, SolvedCapacity
from sglang_prfaas.scheduler.solver import solve

LENGTHS = tuple(float(length) for length in nodes(paper.CASE_STUDY_LENGTHS, 200))
FLEET = paper.case_study_fleet()
SOLVED = SolvedCapacity(FLEET, slo_tokens_per_s=40.0, step_tokens=100.0)


def load(n_p: int = 3, n_d: int = 5, **changes: object) -> PdLoad:
    values: dict[str, object] = {
        "arrival_rate": 2.5, "prefill_busy": 0.6, "decode_busy": 0.6, "lengths": LENGTHS, "output_tokens": 1024.0,
        "n_prfaas": 4.0, "link_gbps": 100.0, **changes,
    }  # fmt: skip
    return PdLoad(n_p=n_p, n_d=n_d, **values)  # type: ignore[arg-type]


def seen(now_s: float, load: PdLoad) -> RoleObservation:
    servers = [RoleServer(f"p{index}", "prefill", 9 - index) for index in range(load.n_p)]
    servers += [RoleServer(f"d{index}", "decode", index + 1) for index in range(load.n_d)]
    return RoleObservation(now_s=now_s, site="pd", servers=servers, load=load)


def run(policy: RolePolicy, load: PdLoad, *, start_s: float = 0.0, looks: int = 5) -> list[RoleCommand | None]:
    return [policy.decide(seen(start_s + 60.0 * look, load)) for look in range(looks)]


def test_the_solver_of_the_case_study_is_followed() -> None:
    assert SOLVED.rates(load(), [(3, 5)])[0] == pytest.approx(
        solve(FLEET, paper.case_study_workload()).lambda_max, rel=0.02
    )
    assert run(RolePolicy(SOLVED), load(arrival_rate=2.9)) == [None] * 5, "3/5 is the best mix"
    policy = RolePolicy(SOLVED)
    first, second = run(policy, load(2, 6, arrival_rate=2.9), looks=2)
    assert first is None
    assert "seen 1 of 2 times" not in policy.reason
    assert second is not None
    assert (second.server, second.role) == ("d0", "prefill"), "the least loaded of the other role"
    assert "N_p 2, N_d 6, demand 3.33/s: 3.00/s now" in second.reason


def test_without_demand_nothing_changes() -> None:
    policy = RolePolicy(SOLVED)
    assert run(policy, load(2, 6, arrival_rate=0.5)) == [None] * 5
    assert "net gain 0.0%" in policy.reason


def test_measured_load_is_enough() -> None:
    hot = load(arrival_rate=10.0, prefill_busy=0.3, decode_busy=1.0, decode_queued=0.5, lengths=())
    assert MeasuredCapacity().rates(hot, [(3, 5), (2, 6)]) == pytest.approx([10 / 1.5, 10 / 1.25])
    commands = run(RolePolicy(MeasuredCapacity()), hot)
    assert commands[1] is not None
    assert commands[1].role == "decode"
    assert commands[2:] == [None] * 3, "one at a time"
    few = msgspec.structs.replace(hot, lengths=LENGTHS[:10])
    assert SOLVED.rates(few, [(3, 5)]) == MeasuredCapacity().rates(few, [(3, 5)])


def test_a_switch_that_costs_more_than_it_wins() -> None:
    wanted = load(2, 6, arrival_rate=2.9)
    dear = RolesConfig(drain_s=500.0, switch_s=390.0, min_gain=0.01)
    assert run(RolePolicy(SOLVED, dear), wanted) == [None] * 5


@pytest.mark.parametrize("counts", [(1, 1), (0, 2), (2, 0)])
def test_one_of_each_role_stays(counts: tuple[int, int]) -> None:
    policy = RolePolicy(MeasuredCapacity(), RolesConfig(min_gain=0.0, confirm=1))
    busy = load(*counts, prefill_busy=1.0, decode_busy=0.1, prefill_queued=9.0)
    assert run(policy, busy) == [None] * 5


def test_rest_after_a_switch_and_more_after_failures() -> None:
    wanted, policy = load(2, 6, arrival_rate=2.9), RolePolicy(SOLVED, RolesConfig(confirm=1))
    assert policy.decide(seen(0.0, wanted)) is not None
    policy.finished(50.0, succeeded=True)
    assert policy.decide(seen(169.0, wanted)) is None
    assert "possible in 1 s" in policy.reason
    now_s = 170.0
    for rest_s in (300.0, 600.0, 1200.0):
        assert policy.decide(seen(now_s, wanted)) is not None
        assert policy.decide(seen(now_s + 1, wanted)) is None
        assert policy.reason == "a switch is under way"
        policy.finished(now_s + 2, succeeded=False)
        assert policy.decide(seen(now_s + 1 + rest_s, wanted)) is None
        now_s += 2 + rest_s


def test_a_wish_that_passes_is_forgotten() -> None:
    policy = RolePolicy(SOLVED)
    wanted, content = load(2, 6, arrival_rate=2.9), load(3, 5, arrival_rate=2.9)
    assert [policy.decide(seen(60.0 * look, each)) for look, each in enumerate((wanted, content, wanted))] == [None] * 3
    assert "seen 1 of 2" in policy.reason


def test_without_the_link_the_site_prefills_alone() -> None:
    alone = load(link_gbps=0.0)
    assert SOLVED.rates(alone, [(3, 5)])[0] < 1.0
    commands = run(RolePolicy(SOLVED), alone)
    assert commands[1] is not None
    assert commands[1].role == "prefill"


def test_slots_where_whole_servers_leave_capacity_idle() -> None:
    """Two servers' worth of N_p 1.5 and N_d 1.5: no whole mix of three reaches it."""
    half = load(1, 2, arrival_rate=3.0, prefill_busy=1.0, decode_busy=0.6, prefill_queued=0.2, lengths=())
    cheap = RolesConfig(drain_s=5.0, switch_s=5.0, slot_period_s=600.0, headroom=1.0)
    policy = RolePolicy(MeasuredCapacity(), cheap)
    command = policy.decide(seen(600.0, half))
    assert command is not None
    assert command.role == "prefill"
    assert command.reason.startswith("slots: N_p 1.")
    policy.finished(610.0, succeeded=True)
    later = load(2, 1, arrival_rate=3.0, prefill_busy=0.6, decode_busy=1.0, decode_queued=0.2, lengths=())
    assert policy.decide(seen(660.0, later)) is None
    command = policy.decide(seen(1140.0, later))
    assert command is not None
    assert command.role == "decode"
    dear = RolesConfig(drain_s=100.0, switch_s=190.0, slot_period_s=600.0, headroom=1.0)
    assert RolePolicy(MeasuredCapacity(), dear).decide(seen(600.0, half)) is None


@given(
    st.integers(1, 6),
    st.integers(1, 6),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 20),
    st.lists(st.booleans(), max_size=12),
)
def test_commands_are_always_possible(
    n_p: int, n_d: int, prefill_busy: float, decode_busy: float, rate: float, results: list[bool]
) -> None:
    policy, now_s = RolePolicy(MeasuredCapacity(), RolesConfig(confirm=1, settle_s=0, backoff_s=0)), 0.0
    for succeeded in results:
        now_s += 60.0
        now = load(n_p, n_d, prefill_busy=prefill_busy, decode_busy=decode_busy, arrival_rate=rate, lengths=())
        command = policy.decide(seen(now_s, now))
        if command is None:
            continue
        assert (command.role == "prefill") == command.server.startswith("d")
        if succeeded:
            n_p, n_d = (n_p + 1, n_d - 1) if command.role == "prefill" else (n_p - 1, n_d + 1)
        assert min(n_p, n_d) >= 1
        policy.finished(now_s, succeeded)


def test_lengths_decide() -> None:
    """The same servers: short prompts with long answers need decode."""
    short = tuple(np.full(100, 2000.0))
    commands = run(RolePolicy(SOLVED), load(arrival_rate=2.4, lengths=short, output_tokens=2048.0))
    assert commands[1] is not None
    assert commands[1].role == "decode"
