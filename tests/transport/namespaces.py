"""Two network namespaces with a wire between them, for as long as this process lives: nothing is left behind.

Each belongs to a thread; what is called in it, with the threads and processes that start there, sees only its own end
of the wire. Needs root and Linux.
"""

from __future__ import annotations

import ctypes
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
CLONE_NEWNET = 0x40000000
"""include/uapi/linux/sched.h"""
BURST = "32kb"
LATENCY = "50ms"


class Namespace:
    """A network namespace without a name, and the thread that lives in it. Raises OSError where that is forbidden."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="namespace", daemon=True)
        self._thread.start()
        try:
            self.call(_unshare)
            self.run("ip link set lo up")
        except BaseException:
            self.close()
            raise

    @property
    def thread_id(self) -> int:
        assert self._thread.native_id is not None
        return self._thread.native_id

    def call(self, function: Callable[[], T], timeout_s: float = 60.0) -> T:
        """Call in the namespace. Raises what it raises."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future.result(timeout_s)

    def run(self, command: str) -> str:
        """Run a command in the namespace. Raises OSError with what it said."""
        words = command.split()
        done = self.call(lambda: subprocess.run(words, capture_output=True, text=True, timeout=30))
        if done.returncode:
            raise OSError(f"{command}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def close(self) -> None:
        self._calls.put(None)
        self._thread.join(10.0)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            function, future = item
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001 - the caller gets it
                future.set_exception(error)


def _unshare() -> None:
    """Give the calling thread a network namespace of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"unshare: {os.strerror(code)}")


class Wire:
    """Two namespaces, `near` and `far`, and what leaves `near` limited to a rate."""

    near_host, far_host = "10.99.0.1", "10.99.0.2"

    def __init__(self, near: Namespace, far: Namespace, mbps: float) -> None:
        self.near, self.far = near, far
        near.run(f"ip link add wire type veth peer name wire netns {far.thread_id}")
        for namespace, host in ((near, self.near_host), (far, self.far_host)):
            namespace.run(f"ip address add {host}/24 dev wire")
            namespace.run("ip link set wire up")
        self._rate("add", mbps)

    def rate(self, mbps: float) -> None:
        """Change what it carries, in Mbit/s with all headers."""
        self._rate("change", mbps)

    def _rate(self, how: str, mbps: float) -> None:
        self.near.run(f"tc qdisc {how} dev wire root tbf rate {mbps:g}mbit burst {BURST} latency {LATENCY}")


@contextmanager
def wire(mbps: float) -> Iterator[Wire]:
    """Raises OSError where it is not permitted, see `obstacle`."""
    near = Namespace()
    try:
        far = Namespace()
        try:
            yield Wire(near, far, mbps)
        finally:
            far.close()
    finally:
        near.close()


def obstacle() -> str:
    """Why there can be no `wire` here, or an empty string."""
    if sys.platform != "linux":
        return "network namespaces need Linux"
    if why := _not_permitted():
        return f"network namespaces are for root only here ({why})"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing; install iproute2"
    try:
        with wire(100):
            return ""
    except OSError as error:
        return f"network namespaces with tc tbf are not permitted: {error}"


def _not_permitted() -> str:
    """Why this process may have no network namespace, or an empty string."""
    found: list[str] = []

    def attempt() -> None:
        try:
            _unshare()
        except OSError as error:
            found.append(error.strerror)

    thread = threading.Thread(target=attempt)  # the namespace ends with it
    thread.start()
    thread.join()
    return "".join(found)
