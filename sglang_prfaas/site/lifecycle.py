"""The life of one server as a pure state machine: events in, actions out, time passed in.

    stopped ──start──▶ starting ──healthy──▶ ready ◀──healthy── unhealthy
                        │    ▲                 └──unhealthy──▶      │
                 exited │    │ tick (backoff over)                  │ exited, or unhealthy for too long
                        ▼    │                                      ▼
                      failed │◀──too many── restarting ◀────────────┘
    any ──stop──▶ stopping ──exited──▶ stopped

A server that never became ready fails at once when it dies: its arguments are wrong, and trying again would only hide
that. One that was ready is restarted with a delay that doubles, at most `max_restarts` times within a window.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import SiteLimits


class State(StrEnum):
    """What a server is doing."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    FAILED = "failed"


class Event(StrEnum):
    """What happened to a server."""

    START = "start"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    EXITED = "exited"
    RESTART = "restart"
    STOP = "stop"
    TICK = "tick"


class Action(StrEnum):
    """What the supervisor has to do."""

    SPAWN = "spawn"
    TERMINATE = "terminate"
    KILL = "kill"


class Lifecycle:
    """One server. `handle` every event, and TICK at `next_tick_s`; do the actions in the order they are returned."""

    def __init__(self, limits: SiteLimits, clock: Clock) -> None:
        self._limits = limits
        self._clock = clock
        self._restarted_at_s: deque[float] = deque()
        self._was_ready = False
        self._alive = False
        self._killed = False
        self._respawn = False
        self.state = State.STOPPED
        self.reason = ""
        """Why the server is in this state, for progress lines and logs; empty in the ordinary course."""
        self.restarts = 0
        """Restarts since the first start, asked for or not."""
        self.next_tick_s: float | None = None
        """When TICK is due, on the clock passed in; None: never."""

    def handle(self, event: Event) -> list[Action]:
        """Take one event. Events that mean nothing in the present state are ignored."""
        match event:
            case Event.START:
                return self._start()
            case Event.HEALTHY:
                return self._healthy()
            case Event.UNHEALTHY:
                return self._unhealthy()
            case Event.EXITED:
                return self._exited()
            case Event.RESTART:
                return self._restart()
            case Event.STOP:
                return self._stop()
            case Event.TICK:
                return self._tick()

    def _enter(self, state: State, reason: str = "", tick_in_s: float | None = None) -> None:
        self.state = state
        self.reason = reason
        self.next_tick_s = None if tick_in_s is None else self._clock.now_s() + tick_in_s

    def _spawn(self, reason: str = "") -> list[Action]:
        self._enter(State.STARTING, reason, self._limits.startup_timeout_s)
        self._alive = True
        self._killed = False
        self._respawn = False
        return [Action.SPAWN]

    def _start(self) -> list[Action]:
        if self.state not in (State.STOPPED, State.FAILED) or self._alive:
            return []
        self._was_ready = False
        self._restarted_at_s.clear()
        return self._spawn()

    def _healthy(self) -> list[Action]:
        if self.state in (State.STARTING, State.UNHEALTHY) and not self._killed:
            self._was_ready = True
            self._enter(State.READY)
        return []

    def _unhealthy(self) -> list[Action]:
        if self.state is State.READY:
            timeout_s = self._limits.unhealthy_timeout_s
            self._enter(State.UNHEALTHY, "health checks fail", timeout_s or None)
        return []

    def _exited(self) -> list[Action]:
        if not self._alive:
            return []
        self._alive = False
        if self.state is State.STOPPING:
            if self._respawn:
                self.restarts += 1
                return self._spawn("restart asked for")
            self._enter(State.STOPPED)
        elif self.state is State.FAILED:
            self.next_tick_s = None
        elif not self._was_ready:
            self._enter(State.FAILED, self.reason or "died before it was ready")
        else:
            self._schedule_restart()
        return []

    def _schedule_restart(self) -> None:
        now_s = self._clock.now_s()
        window_s = self._limits.restart_window_s
        while self._restarted_at_s and now_s - self._restarted_at_s[0] > window_s:
            self._restarted_at_s.popleft()
        recent = len(self._restarted_at_s)
        if recent >= self._limits.max_restarts:
            self._enter(State.FAILED, f"died again after {recent} restarts within {window_s:g} s")
            return
        delay_s = self._limits.restart_backoff_s * 2**recent
        self._enter(State.RESTARTING, f"{self.reason or 'died'}; restarts in {delay_s:g} s", delay_s)

    def _restart(self) -> list[Action]:
        if self.state is State.RESTARTING or (self.state is State.FAILED and not self._alive):
            self.restarts += 1
            return self._spawn("restart asked for")
        if self.state not in (State.STARTING, State.READY, State.UNHEALTHY):
            return []
        self._enter(State.STOPPING, "restart asked for", self._limits.stop_timeout_s)
        self._respawn = True
        return [Action.TERMINATE]

    def _stop(self) -> list[Action]:
        self._respawn = False
        if self.state in (State.STOPPED, State.STOPPING):
            return []
        if not self._alive:
            self._enter(State.STOPPED)
            return []
        self._enter(State.STOPPING, "", self._limits.stop_timeout_s)
        return [Action.TERMINATE]

    def _tick(self) -> list[Action]:
        if self.next_tick_s is None or self._clock.now_s() < self.next_tick_s:
            return []
        self.next_tick_s = None
        if self.state is State.RESTARTING:
            self._restarted_at_s.append(self._clock.now_s())
            self.restarts += 1
            return self._spawn()
        if not self._alive:
            return []
        if self.state is State.STARTING:
            self.reason = f"not ready within {self._limits.startup_timeout_s:g} s"
        elif self.state is State.UNHEALTHY:
            self.reason = f"health checks failed for {self._limits.unhealthy_timeout_s:g} s"
        elif self.state is State.STOPPING:
            self.reason = f"did not end within {self._limits.stop_timeout_s:g} s"
        self._killed = True
        return [Action.KILL]
