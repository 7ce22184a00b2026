"""How much KVCache may be on its way over a link: what goes beyond it waits on the prefill side, before it is computed.

A request is let in once decode has reserved its pages, and counts with all its bytes until they are acknowledged. Thus
what a slow or broken link holds of a prefill server's pages is bounded, and the server goes on serving the others
(sglang#30033). A request larger than the limit is let in when nothing else is on its way.

Those that wait are let in as transfers share a session (`sharing`). All ranks of a tensor-parallel server have to let a
request in, and each sees them come a moment apart. So nothing is reserved before a transfer starts, and a request holds
another up only where it is ahead of it by `MARGIN_S` of ageing: no two ranks can then wait for one another.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Generic, TypeVar

from msgspec import Struct

from sglang_prfaas.transport.sharing import ShortestFirst

MARGIN_S = 1.0
"""More than the same request's arrivals at two ranks are apart."""
LIMIT_S = 10.0
"""KVCache on its way, in time that the link takes for it, where no limit is configured."""
SHARED_POOL = 0.5
"""Of a rank's pages, that one of several links may hold."""

Key = TypeVar("Key", bound=Hashable)


class _Request(Struct):
    nbytes: int
    key: float


class Admission(Generic[Key]):
    """The requests over one link, by any key. `limit_bytes` may change at any time; 0: no limit. From any thread.

    timeout_s: seconds after which a request that was not let in should be given up."""

    def __init__(self, limit_bytes: int = 0, timeout_s: float = 60.0) -> None:
        self.limit_bytes = limit_bytes
        self.timeout_s = timeout_s
        self._lock = threading.Lock()
        self._sharing = ShortestFirst()
        self._margin = self._sharing.ageing_bytes_per_s * MARGIN_S
        self._waiting: dict[Key, _Request] = {}
        self._started: dict[Key, int] = {}
        self._first = float("-inf")
        self.inflight_bytes = 0
        """Of requests that were let in and have not ended, less what was acknowledged."""

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def ask(self, key: Key, nbytes: int, now_s: float) -> None:
        """A request wants to send so many bytes. Again for the same one: nothing changes."""
        with self._lock:
            if key in self._waiting or key in self._started:
                return
            request = _Request(nbytes, self._sharing.key(nbytes, now_s))
            self._first = min(self._first, request.key) if self._waiting else request.key
            self._waiting[key] = request

    def admits(self, key: Key) -> bool:
        """Whether a request may start now. One that was never asked for may not."""
        with self._lock:
            if key in self._started:
                return True
            request = self._waiting.get(key)
            if request is None:
                return False
            if not self.limit_bytes:
                return True
            fits = self.inflight_bytes + request.nbytes <= self.limit_bytes or not self.inflight_bytes
            return fits and self._first + self._margin > request.key

    def start(self, key: Key, nbytes: int) -> None:
        """A request of so many bytes has started, let in or not. Idempotent."""
        with self._lock:
            self._leave(key)
            if key not in self._started:
                self._started[key] = nbytes
                self.inflight_bytes += nbytes

    def acknowledged(self, key: Key, nbytes: int) -> None:
        """Decode has so many bytes of a request that has started."""
        with self._lock:
            left = self._started.get(key)
            if left is not None:
                nbytes = min(nbytes, left)
                self._started[key] = left - nbytes
                self.inflight_bytes -= nbytes

    def end(self, key: Key) -> None:
        """A request has ended, wherever it stood. Idempotent."""
        with self._lock:
            self._leave(key)
            self.inflight_bytes -= self._started.pop(key, 0)

    def refusal(self) -> str:
        """Why a request was not let in until its time was over."""
        return (
            f"the link is full: not let in for {self.timeout_s:g} s, {self.inflight_bytes} bytes of KVCache are on "
            f"their way, at most {self.limit_bytes} may be"
        )

    def _leave(self, key: Key) -> None:
        request = self._waiting.pop(key, None)
        if request is not None and request.key == self._first and self._waiting:
            self._first = min(one.key for one in self._waiting.values())


def limit_of(configured_bytes: int, capacity_bytes_per_s: float, rtt_s: float, pool_bytes: int, links: int) -> int:
    """Bytes that may be on their way over one link: as configured, else what the link carries in `LIMIT_S` and a round
    trip, and where a rank has several links not more than `SHARED_POOL` of its pages. 0, no limit: nothing is known.

    pool_bytes: of all pages of the rank, 0 where unknown."""
    if configured_bytes:
        return configured_bytes
    limits = []
    if capacity_bytes_per_s > 0:
        limits.append(capacity_bytes_per_s * (LIMIT_S + rtt_s))
    if pool_bytes and links > 1:
        limits.append(SHARED_POOL * pool_bytes)
    return max(1, int(min(limits))) if limits else 0
