"""How long this process was kept from running, so that limits in seconds hold on a loaded machine, too."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_BEAT_S = 0.01


@contextmanager
def lateness() -> Iterator[Callable[[], float]]:
    """Yields the seconds, since the beginning and in sum, by which a thread ran later than it asked to. On an idle
    machine that is about a hundredth of the time."""
    stop = threading.Event()
    begun_s = asked_s = time.monotonic()
    slept_s = 0.0

    def late_s() -> float:
        return time.monotonic() - begun_s - slept_s - min(_BEAT_S, time.monotonic() - asked_s)

    def beat() -> None:
        nonlocal asked_s, slept_s
        while not stop.wait(_BEAT_S):
            slept_s += _BEAT_S
            asked_s = time.monotonic()

    thread = threading.Thread(target=beat, name="lateness", daemon=True)
    thread.start()
    try:
        yield late_s
    finally:
        stop.set()
        thread.join()
