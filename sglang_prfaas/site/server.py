"""One supervised server: the lifecycle's actions carried out on a real process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import SiteLimits
from sglang_prfaas.core.addresses import base_url
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.monitor.owned_directory import OwnedDirectory, new_path
from sglang_prfaas.site import free_ports, health
from sglang_prfaas.site.commands import ServerCommand, listening_host
from sglang_prfaas.site.lifecycle import Action, Event, Lifecycle, State
from sglang_prfaas.site.process import ChildProcess, describe_exit, last_line, note, rotate, tail

_STARTUP_POLL_S = 0.5
_METRICS_DIR = "PROMETHEUS_MULTIPROC_DIR"
"""Where the processes of a server keep their metrics (prometheus_client). SGLang makes one that is left behind when its
process is killed, as the last ones of a server often are."""

OnChange = Callable[["Server"], None]


class Server:
    """Starts, watches, restarts and stops one server. All methods belong to the event loop's thread."""

    def __init__(
        self,
        command: ServerCommand,
        limits: SiteLimits,
        log_dir: Path,
        clock: Clock,
        *,
        environ: Mapping[str, str] | None = None,
        avoid_ports: Iterable[int] = (),
        on_change: OnChange | None = None,
    ) -> None:
        """environ: what the server inherits (None: this process's environment). avoid_ports: never chosen for it."""
        self.command = command
        self.log = log_dir / f"{command.name}.log"
        self.started_at_s = 0.0
        self.exit_code: int | None = None
        self._limits = limits
        self._clock = clock
        self._environ = environ
        self._avoid_ports = frozenset(avoid_ports)
        self._on_change = on_change
        self._lifecycle = Lifecycle(limits, clock)
        self._process: ChildProcess | None = None
        self._pending: Action | None = None
        self._at_once = False
        self._tick: asyncio.TimerHandle | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def state(self) -> State:
        return self._lifecycle.state

    @property
    def reason(self) -> str:
        """Why the server is in its state; empty in the ordinary course."""
        return self._lifecycle.reason

    @property
    def restarts(self) -> int:
        return self._lifecycle.restarts

    @property
    def pid(self) -> int | None:
        """Process id, None while no process runs."""
        return self._process.pid if self._process is not None else None

    @property
    def url(self) -> str:
        """Base URL on this machine."""
        return base_url("http", listening_host(self.command.host), self.command.port)

    @property
    def age_s(self) -> float:
        """Seconds since the present process was started."""
        return self._clock.now_s() - self.started_at_s

    def start(self) -> None:
        """Begin to start; returns at once. A fresh log is begun, the one before is kept as `.1`."""
        if self.state in (State.STOPPED, State.FAILED):
            rotate(self.log)
        self._dispatch(Event.START)

    def restart(self) -> None:
        """Begin to end the process in order and start it again; returns at once."""
        self._dispatch(Event.RESTART)

    def stop(self) -> None:
        """Begin to stop in order; returns at once."""
        self._dispatch(Event.STOP)

    def abort(self) -> None:
        """Begin to stop without giving the process time; returns at once."""
        self._at_once = True
        self._dispatch(Event.STOP)
        if self.state is State.STOPPING:
            self._end_process(Action.KILL)

    async def kill(self) -> None:
        """End the process group at once, as a crash would, and wait until the end is noticed."""
        process = self._process
        if process is None:
            return
        process.kill()
        while self._process is process:
            await self._next_change()

    async def stopped(self) -> None:
        """Wait until no process is left and none will be started."""
        while self.state not in (State.STOPPED, State.FAILED) or self._process is not None:
            await self._next_change()
        if self._task is not None:
            await self._task

    async def wait_for(self, *states: State, timeout_s: float) -> None:
        """Wait for one of the states. Raises LaunchError with the log's tail on failure of the server or timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.state not in states:
                    if self.state is State.FAILED:
                        raise LaunchError(self.obituary())
                    await self._next_change()
        except TimeoutError:
            wanted = " or ".join(states)
            raise LaunchError(
                f"server {self.name} is {self.state} instead of {wanted} after {timeout_s:g} s; log {self.log}:\n"
                f"{indented_tail(self.log)}"
            ) from None

    def obituary(self) -> str:
        """Why the server failed, what its log ends with, and where to look."""
        how = f" ({describe_exit(self.exit_code)})" if self.exit_code is not None else ""
        last = last_line(self.log, 400)
        return (
            f"server {self.name} failed: {self.reason}{how}" + (f": {last}" if last else "") + "\n"
            f"the end of {self.log}, which begins with the command:\n{indented_tail(self.log)}\n"
            f"correct what it says, in the site's file or with flags, and start again"
        )

    async def until(self, *states: State) -> None:
        """Wait for one of the states, however long."""
        while self.state not in states:
            await self._next_change()

    async def _next_change(self) -> None:
        await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _dispatch(self, event: Event) -> None:
        before = self.state
        actions = self._lifecycle.handle(event)
        self._schedule_tick()
        for action in actions:
            if action is Action.SPAWN:
                self._pending, self._at_once = None, False
                self._task = asyncio.create_task(self._run(self._task), name=f"server {self.name}")
            else:
                self._end_process(action)
        if self.state is not before or actions:
            self._notify()
            if self._on_change is not None:
                self._on_change(self)

    def _end_process(self, action: Action) -> None:
        if self._process is None:
            self._pending = action  # the process is still being made
        elif action is Action.TERMINATE and not self._at_once:
            self._process.terminate()
        else:
            self._process.kill()

    def _schedule_tick(self) -> None:
        if self._tick is not None:
            self._tick.cancel()
            self._tick = None
        due_s = self._lifecycle.next_tick_s
        if due_s is not None:
            delay_s = max(0.0, due_s - self._clock.now_s())
            self._tick = asyncio.get_running_loop().call_later(delay_s, self._dispatch, Event.TICK)

    async def _run(self, previous: asyncio.Task[None] | None) -> None:
        """One process from its start to its end."""
        if previous is not None:
            await previous
        self.started_at_s = self._clock.now_s()
        self.exit_code = None
        held: free_ports.HeldPort | None = None
        metrics: OwnedDirectory | None = None
        try:
            argv = list(self.command.argv)
            if self.command.needs_nccl_port:
                held = free_ports.HeldPort(self._avoid_ports)
                argv += ["--nccl-port", str(held.port)]
            environ = {**(os.environ if self._environ is None else self._environ), **self.command.env}
            if _METRICS_DIR not in environ:
                metrics = OwnedDirectory(new_path("metrics"))
                environ[_METRICS_DIR] = str(metrics.path)
            self._process = await ChildProcess.spawn(argv, environ, self.log)
        except (OSError, LaunchError) as error:
            self._write_log(f"cannot be started: {error}")
        else:
            await self._watch(self._process)
        finally:
            if held is not None:
                held.release()
            if metrics is not None:
                metrics.remove()
        self._process = None
        self._dispatch(Event.EXITED)
        self._notify()

    async def _watch(self, process: ChildProcess) -> None:
        if self._pending is not None:
            self._end_process(self._pending)
        checks = asyncio.create_task(self._check_health(), name=f"health of {self.name}")
        try:
            self.exit_code = await process.wait()
        finally:
            process.kill()
            checks.cancel()
            with suppress(asyncio.CancelledError):
                await checks
        self._write_log(f"ended with {describe_exit(self.exit_code)}")

    async def _check_health(self) -> None:
        host, limits = listening_host(self.command.host), self._limits
        while True:
            starting = self.state is State.STARTING
            await asyncio.sleep(
                min(_STARTUP_POLL_S, limits.health_interval_s) if starting else limits.health_interval_s
            )
            ok = await health.answers_ok(host, self.command.port, limits.health_path, limits.health_timeout_s)
            if ok and starting and self.command.bootstrap_port:
                ok = await health.listens(host, self.command.bootstrap_port, limits.health_timeout_s)
            self._dispatch(Event.HEALTHY if ok else Event.UNHEALTHY)

    def _write_log(self, text: str) -> None:
        note(self.log, text)


def indented_tail(log: Path, lines: int = 30) -> str:
    """The end of a log, set off from the text around it."""
    return "\n".join("  | " + line for line in tail(log, lines).splitlines()) or "  | (empty)"
