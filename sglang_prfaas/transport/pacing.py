"""A rate limit that several threads share, as a pure function of the time."""

from __future__ import annotations

import threading

from sglang_prfaas.clock import Clock

CHUNK_S = 0.05
"""How long one chunk may take at a rate: so short are bursts under a limit, and so long at most a thread sleeps between
two."""
MIN_CHUNK_BYTES = 4096


def paced_chunk_bytes(chunk_bytes: int, rate_limit_mbps: float) -> int:
    """The chunk size for a rate in Mbit/s, 0 for none known: other requests wait for one chunk at most."""
    if not rate_limit_mbps:
        return chunk_bytes
    return min(chunk_bytes, max(MIN_CHUNK_BYTES, int(rate_limit_mbps * 1e6 / 8 * CHUNK_S)))


class Pacer:
    """Spreads bytes over time so that they leave at `bytes_per_s` at most; 0 stands for no limit. Any thread may call.

    Nothing is saved up while there is nothing to send, so that no burst follows a pause.
    """

    def __init__(self, clock: Clock, bytes_per_s: float) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._free_s = clock.now_s()
        self._lock = threading.Lock()

    @property
    def limits(self) -> bool:
        """Whether there is a limit."""
        return self._bytes_per_s > 0

    def reserve(self, nbytes: int) -> float:
        """Take the next `nbytes` of the rate. Returns how many seconds to wait before they may leave."""
        if not self._bytes_per_s:
            return 0.0
        with self._lock:
            now_s = self._clock.now_s()
            start_s = max(self._free_s, now_s)
            self._free_s = start_s + nbytes / self._bytes_per_s
            return start_s - now_s
