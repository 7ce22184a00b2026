"""Sites for code without an event loop: scripts, and fixtures of tests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.process import tail
from sglang_prfaas.site.server import Server
from sglang_prfaas.site.site import Site

T = TypeVar("T")


class LoopThread:
    """An event loop in a thread of its own. Children started from it live no longer than the thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sites", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for it. An interrupt while waiting cancels it first."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class RunningSite:
    """A site that runs, for plain code. Servers are addressed by name."""

    def __init__(self, site: Site, thread: LoopThread) -> None:
        self.site = site
        self.name = site.name
        self.agent_url = site.agent_url
        self._thread = thread

    def server(self, name: str) -> Server:
        """A server, to read from: `url`, `pid`, `state`, `restarts`, `log`, `command`. Raises KeyError if unknown."""
        return self.site.servers[name]

    def url(self, name: str) -> str:
        return self.server(name).url

    def pid(self, name: str) -> int:
        """Process id of a server. Raises LaunchError where it does not run."""
        server = self.server(name)
        if server.pid is None:
            raise LaunchError(f"server {name} does not run, it is {server.state}")
        return server.pid

    def log(self, name: str) -> Path:
        return self.server(name).log

    def tail(self, name: str, lines: int = 40) -> str:
        """The last lines of a server's log."""
        return tail(self.log(name), lines)

    def kill(self, name: str) -> None:
        """End a server's processes as a crash would; returns when they are gone. It is restarted after a delay."""
        self._thread.run(self.server(name).kill())

    def restart(self, name: str) -> None:
        """Begin to restart a server in order; see `wait_ready`."""
        self._thread.run(self._call(self.server(name).restart))

    def stop(self, name: str, *, at_once: bool = False) -> None:
        """Stop a server, in order or at once; returns when it is gone. It stays down until `start`."""
        server = self.server(name)
        self._thread.run(self._call(server.abort if at_once else server.stop))
        self._thread.run(server.stopped())

    def start(self, name: str) -> None:
        """Begin to start a stopped or failed server; see `wait_ready`."""
        self._thread.run(self._call(self.server(name).start))

    def wait_ready(self, name: str, timeout_s: float = 600.0) -> None:
        """Wait until a server is ready. Raises LaunchError with the end of its log if it fails or time runs out."""
        self._thread.run(self.server(name).wait_for(State.READY, timeout_s=timeout_s))

    @staticmethod
    async def _call(function: Any) -> None:
        function()


@contextmanager
def running(*sites: Site, drain: bool = False) -> Iterator[Mapping[str, RunningSite]]:
    """Start sites in parallel, wait until all their servers are ready, and stop them at the end.

    Gives the running sites by name. drain: let servers finish their requests at the end instead of killing them.
    Raises LaunchError with the end of the log of every server that failed; nothing is left running then.
    """
    thread = LoopThread()
    try:
        try:
            thread.run(start_all(*sites))
            yield {site.name: RunningSite(site, thread) for site in sites}
        finally:
            thread.run(stop_all(*sites, at_once=not drain))
    finally:
        thread.close()


async def start_all(*sites: Site) -> None:
    """Start sites in parallel. Raises LaunchError for the first that fails; all are stopped then."""
    tasks = [asyncio.create_task(site.start()) for site in sites]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await stop_all(*sites, at_once=True)
        raise


async def stop_all(*sites: Site, at_once: bool = False) -> None:
    """Stop sites in parallel."""
    await asyncio.gather(*(site.stop(at_once=at_once) for site in sites))
