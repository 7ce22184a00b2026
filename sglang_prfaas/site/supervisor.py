"""Several servers together: started in parallel, stopped in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from sglang_prfaas.clock import Clock, MonotonicClock
from sglang_prfaas.config.schema import SiteLimits
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.site.commands import ServerCommand
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.progress import Progress
from sglang_prfaas.site.server import Server

_STOP_ORDER = ("prefill", None, "decode")
"""Prefill servers first: each ends its requests while the decode servers it sends to still run, then these finish."""


class Supervisor:
    """Starts, watches, restarts and stops servers. All methods belong to one event loop."""

    def __init__(
        self,
        commands: Sequence[ServerCommand],
        limits: SiteLimits,
        log_dir: Path,
        *,
        clock: Clock | None = None,
        environ: Mapping[str, str] | None = None,
        avoid_ports: Iterable[int] = (),
        progress: Progress | None = None,
    ) -> None:
        """environ: what servers inherit (None: this process's). avoid_ports: never chosen for a server's inner use."""
        self._clock = clock or MonotonicClock()
        self._progress = progress or Progress()
        self.on_change: Callable[[], None] = lambda: None
        """Called after a server has entered a state."""
        avoid = {*avoid_ports, *(command.port for command in commands)}
        self.servers = {
            command.name: Server(
                command,
                limits,
                log_dir,
                self._clock,
                environ=environ,
                avoid_ports=avoid,
                on_change=self._changed,
            )
            for command in commands
        }

    async def start(self) -> None:
        """Start all servers in parallel and wait until each is ready.

        Raises LaunchError with the end of the log of every server that failed; the others are ended first.
        """
        for server in self.servers.values():
            server.start()
        tasks = [asyncio.create_task(self._until_ready(server)) for server in self.servers.values()]
        try:
            pending = set(tasks)
            while pending:
                done, pending = await asyncio.wait(
                    pending, timeout=self._progress.interval_s, return_when=asyncio.FIRST_EXCEPTION
                )
                if any(task.exception() for task in done):
                    break
                self._progress.waiting(server for server in self.servers.values() if server.state is State.STARTING)
            failures = [server.obituary() for server in self.servers.values() if server.state is State.FAILED]
            if failures:
                raise LaunchError("\n".join(failures))
        except BaseException:
            await self.stop(at_once=True)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self, *, at_once: bool = False) -> None:
        """Stop all servers and wait until none is left.

        In order: the prefill servers drain and end, then the decode servers. Each gets `stop_timeout_s` after SIGTERM
        before its whole process group is killed. at_once: all are killed without being asked.
        """
        if at_once:
            for server in self.servers.values():
                server.abort()
            await asyncio.gather(*(server.stopped() for server in self.servers.values()))
            return
        for server in self.servers.values():
            if server.state in (State.STARTING, State.RESTARTING):
                server.abort()
        for role in _STOP_ORDER:
            group = [server for server in self.servers.values() if server.command.role == role]
            for server in group:
                server.stop()
            await asyncio.gather(*(server.stopped() for server in group))

    async def all_failed(self) -> None:
        """Wait until every server was given up."""
        await asyncio.gather(*(server.until(State.FAILED) for server in self.servers.values()))

    def _changed(self, server: Server) -> None:
        self._progress.changed(server)
        self.on_change()

    async def _until_ready(self, server: Server) -> None:
        await server.until(State.READY, State.FAILED, State.STOPPED)
        if server.state is not State.READY:
            raise LaunchError(f"server {server.name} is {server.state}")
