"""Whether a link is ample or scarce (PrfaaS section 3.4.3): is there room beside the KVCache that must cross it?"""

from __future__ import annotations


class LinkRoom:
    """Utilisation since the last look, with hysteresis. Pure: figures and times are passed in.

    Scarce from the share `high` on, or with `backlog_s` seconds of KVCache waiting; ample again below `low`.
    """

    def __init__(self, *, low: float = 0.4, high: float = 0.6, backlog_s: float = 0.2, window_s: float = 5.0) -> None:
        self._low, self._high, self._backlog_s, self._window_s = low, high, backlog_s, window_s
        self._ample = True
        self._since_s = self._sent_bytes = 0.0

    def ample(self, now_s: float, *, capacity_bytes_per_s: float, sent_bytes: float, backlog_bytes: float) -> bool:
        """The verdict for now. `sent_bytes`: all that was ever sent; `backlog_bytes`: ready and not sent."""
        if capacity_bytes_per_s <= 0 or backlog_bytes > self._backlog_s * capacity_bytes_per_s:
            self._ample = False
            return False
        if (seconds := now_s - self._since_s) >= self._window_s:
            used = (sent_bytes - self._sent_bytes) / seconds / capacity_bytes_per_s
            self._ample = used < (self._high if self._ample else self._low)
            self._since_s, self._sent_bytes = now_s, sent_bytes
        return self._ample
