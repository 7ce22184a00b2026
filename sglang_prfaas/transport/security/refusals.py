"""Log lines about refused peers, bounded: whoever is refused again and again cannot fill a disk."""

from __future__ import annotations

import logging
import threading

from sglang_prfaas.clock import Clock

LINES = 30
WINDOW_S = 60.0
"""At most LINES different ones in any window of so many seconds; the rest is counted, and told with the next line."""


class RefusalLog:
    """Warnings of one listener. Safe to use from any thread."""

    def __init__(self, logger: logging.Logger, clock: Clock) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._window_s = clock.now_s()
        self._told: set[str] = set()
        self._left_out = 0

    def warn(self, text: str, level: int = logging.WARNING) -> None:
        """Log a line, or count it."""
        with self._lock:
            now_s = self._clock.now_s()
            if now_s - self._window_s >= WINDOW_S:
                self._window_s, self._told = now_s, set()
            if len(self._told) >= LINES or text in self._told:
                self._left_out += 1
                return
            self._told.add(text)
            left_out, self._left_out = self._left_out, 0
        if left_out:
            self._logger.log(level, "prfaas: %s (and %d more refusals before it)", text, left_out)
        else:
            self._logger.log(level, "prfaas: %s", text)
