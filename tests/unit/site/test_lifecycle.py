"""The life of a server: cases in words, and properties over any sequence of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.config.schema import SiteLimits
from sglang_prfaas.site.lifecycle import Action, Event, Lifecycle, State

LIMITS = SiteLimits(
    startup_timeout_s=100,
    stop_timeout_s=10,
    unhealthy_timeout_s=50,
    max_restarts=2,
    restart_window_s=1000,
    restart_backoff_s=1,
)


class Life:
    """A lifecycle with its clock."""

    def __init__(self, limits: SiteLimits = LIMITS) -> None:
        self.clock = VirtualClock()
        self.machine = Lifecycle(limits, self.clock)

    def events(self, *events: Event) -> list[Action]:
        return [action for event in events for action in self.machine.handle(event)]

    def after(self, seconds: float) -> list[Action]:
        """Let time pass, and the tick come where it is due."""
        self.clock.advance(seconds)
        return self.events(Event.TICK)

    def state(self) -> State:
        return self.machine.state


@pytest.fixture
def ready() -> Life:
    life = Life()
    assert life.events(Event.START, Event.HEALTHY) == [Action.SPAWN]
    assert life.state() is State.READY
    return life


def test_a_server_that_dies_before_it_is_ready_fails_at_once() -> None:
    life = Life()
    life.events(Event.START, Event.UNHEALTHY, Event.EXITED)
    assert life.state() is State.FAILED
    assert life.machine.reason == "died before it was ready"


def test_a_server_that_does_not_become_ready_is_killed_and_fails() -> None:
    life = Life()
    life.events(Event.START)
    assert life.after(99) == []
    assert life.after(1) == [Action.KILL]
    assert life.events(Event.HEALTHY) == [], "too late: it was killed"
    assert life.events(Event.EXITED) == []
    assert life.state() is State.FAILED
    assert life.machine.reason == "not ready within 100 s"


def test_a_ready_server_that_dies_is_restarted_with_a_delay_that_doubles(ready: Life) -> None:
    for delay_s in (1, 2):
        assert ready.events(Event.EXITED) == []
        assert ready.state() is State.RESTARTING
        assert ready.after(delay_s / 2) == []
        assert ready.after(delay_s / 2) == [Action.SPAWN]
        ready.events(Event.HEALTHY)
        assert ready.state() is State.READY
    ready.events(Event.EXITED)
    assert ready.state() is State.FAILED
    assert "after 2 restarts within 1000 s" in ready.machine.reason


def test_restarts_long_ago_do_not_count(ready: Life) -> None:
    for _ in range(5):
        ready.clock.advance(1001)
        ready.events(Event.EXITED)
        assert ready.after(1) == [Action.SPAWN]
        ready.events(Event.HEALTHY)
    assert ready.machine.restarts == 5


def test_an_unhealthy_server_recovers_or_is_killed_and_restarted(ready: Life) -> None:
    ready.events(Event.UNHEALTHY)
    assert ready.state() is State.UNHEALTHY
    ready.events(Event.HEALTHY)
    assert ready.state() is State.READY
    ready.events(Event.UNHEALTHY)
    assert ready.after(49) == []
    assert ready.events(Event.UNHEALTHY) == []
    assert ready.after(1) == [Action.KILL]
    ready.events(Event.EXITED)
    assert ready.state() is State.RESTARTING
    assert ready.machine.reason.startswith("health checks failed for 50 s")


def test_unhealthy_for_ever_where_the_limit_is_zero() -> None:
    life = Life(SiteLimits(unhealthy_timeout_s=0))
    life.events(Event.START, Event.HEALTHY, Event.UNHEALTHY)
    assert life.machine.next_tick_s is None


def test_stop_asks_first_and_kills_later(ready: Life) -> None:
    assert ready.events(Event.STOP) == [Action.TERMINATE]
    assert ready.after(9) == []
    assert ready.after(1) == [Action.KILL]
    ready.events(Event.EXITED)
    assert ready.state() is State.STOPPED


def test_stop_while_waiting_for_a_restart(ready: Life) -> None:
    ready.events(Event.EXITED, Event.STOP)
    assert ready.state() is State.STOPPED
    assert ready.after(1000) == []


def test_a_restart_that_was_asked_for_ends_in_order_first(ready: Life) -> None:
    assert ready.events(Event.RESTART) == [Action.TERMINATE]
    assert ready.state() is State.STOPPING
    assert ready.events(Event.EXITED) == [Action.SPAWN]
    assert ready.state() is State.STARTING


def test_stop_wins_over_a_restart(ready: Life) -> None:
    ready.events(Event.RESTART, Event.STOP)
    assert ready.events(Event.EXITED) == []
    assert ready.state() is State.STOPPED


def test_a_failed_server_can_be_started_again() -> None:
    life = Life()
    life.events(Event.START, Event.EXITED)
    assert life.events(Event.START) == [Action.SPAWN]


STEPS = st.lists(st.one_of(st.sampled_from([e for e in Event if e is not Event.TICK]), st.floats(0, 200)), max_size=60)


class World:
    """The process behind a lifecycle: exits only while it lives, and only one lives at a time."""

    def __init__(self) -> None:
        self.life = Life()
        self.alive = False
        self.automatic_restarts_at_s: list[float] = []

    def step(self, step: Event | float) -> None:
        waiting = self.life.state() is State.RESTARTING
        if isinstance(step, Event):
            if step is Event.EXITED and not self.alive:
                return
            if step is Event.EXITED:
                self.alive = False
            actions = self.life.events(step)
        else:
            actions = self.life.after(step)
        for action in actions:
            if action is Action.SPAWN:
                assert not self.alive, "two processes at once"
                self.alive = True
                if waiting and not isinstance(step, Event):
                    self.automatic_restarts_at_s.append(self.life.clock.now_s())
            else:
                assert self.alive, f"{action} of no process"


@given(STEPS)
@settings(max_examples=400)
def test_any_sequence_of_events(steps: list[Event | float]) -> None:
    world = World()
    for step in steps:
        if step is Event.START:
            world.automatic_restarts_at_s.clear()
        world.step(step)
        state = world.life.state()
        if state in (State.STOPPED, State.FAILED, State.RESTARTING):
            assert not world.alive
        if state in (State.STARTING, State.READY, State.UNHEALTHY, State.STOPPING):
            assert world.alive
        if state in (State.RESTARTING, State.STARTING):
            assert world.life.machine.next_tick_s is not None or world.alive
    recent = [
        at_s for at_s in world.automatic_restarts_at_s if world.life.clock.now_s() - at_s < LIMITS.restart_window_s
    ]
    assert len(recent) <= LIMITS.max_restarts


@given(STEPS)
def test_after_stop_it_ends_and_stays_down(steps: list[Event | float]) -> None:
    world = World()
    for step in steps:
        world.step(step)
    world.step(Event.STOP)
    world.step(LIMITS.stop_timeout_s)
    world.step(Event.EXITED)
    assert world.life.state() is State.STOPPED
    for later in (Event.HEALTHY, Event.UNHEALTHY, Event.EXITED, 1e6, Event.STOP, 1e6):
        world.step(later)
    assert world.life.state() is State.STOPPED
    assert not world.alive
