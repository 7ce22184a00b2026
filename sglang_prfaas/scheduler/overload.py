"""Whether more requests miss their objective than may, and which of them are to pay for it: the longest 7 %.

Under an overload nothing serves all in time, and whoever always serves those first that still can make it leaves the
others behind for as long as it lasts. So the order changes once more than `LATE_SHARE` of the recent requests are late
(`dispatch.py`). Pure.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from msgspec import Struct

LATE_SHARE = 0.1
LONG_SHARE = 0.07
RECENT_REQUESTS = 300
_SIZES = 1000
_SIZES_INTERVAL = 50


class Lateness(Struct, eq=False, gc=False):
    """Of one request: whether it is late, and whether it still counts."""

    late: bool = False
    recent: bool = True


class Overload:
    """Watches the recent requests of both paths together."""

    def __init__(self) -> None:
        self._recent: deque[Lateness] = deque()
        self._sizes_s: deque[float] = deque(maxlen=_SIZES)
        self._late = self._added = 0
        self._long_s = float("inf")

    @property
    def is_on(self) -> bool:
        """Whether more than `LATE_SHARE` of `RECENT_REQUESTS` are late."""
        return self._late > LATE_SHARE * RECENT_REQUESTS

    def add(self, size_s: float) -> tuple[Lateness, bool]:
        """One more request, of `size_s` seconds of prefill. Returns also whether it is among the longest."""
        if len(self._recent) == RECENT_REQUESTS:
            oldest = self._recent.popleft()
            oldest.recent = False
            self._late -= oldest.late
        lateness = Lateness()
        self._recent.append(lateness)
        self._sizes_s.append(size_s)
        self._added += 1
        if self._added % _SIZES_INTERVAL == 0:
            self._long_s = float(np.quantile(np.array(self._sizes_s), 1 - LONG_SHARE, method="lower"))
        return lateness, size_s > self._long_s

    def missed(self, lateness: Lateness) -> None:
        """A request cannot make it any more."""
        if not lateness.late:
            lateness.late = True
            self._late += lateness.recent
