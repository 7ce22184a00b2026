"""How a link between two sites fares, from looks at the connections over it. Pure: samples and times are passed in.

Used: bytes that the peer's kernel acknowledged, over the last half second.

Capacity: what the mover's connections could carry together, competing traffic being what it is. Only intervals count in
which the network was the limit: the sockets held data all the time, and neither the receiver's window, nor the send
buffer, nor a lack of data held them back (as BBR leaves application-limited samples out, draft-cardwell-iccrg-bbr). The
largest mean over 0.3 s of the last 0.5 s is taken, so that a link that drops is known within a second. A larger rate
counts in any case. Until it was measured it is as configured; a measurement that is older than 5 s goes back to the
configured value with a half-life of 10 s, so that a link which was once slow is tried again.

Congestion: any of these, for 0.15 s; over once none of them reaches half of its limit for 0.5 s.

    delay     round-trip time over its minimum by 25 ms and by the minimum itself: a queue stands on the way
    loss      2 % of the segments of the last half second were sent again
    backlog   what waits takes the link 1 s, or 0.25 s while it grows: more is put in than leaves
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from msgspec import Struct

from sglang_prfaas.core.link_capacity import LinkCapacity

WINDOW_S = 0.5
AVERAGE_S = 0.3
BUSY_SHARE = 0.9
"""Of an interval in which the network has to be the limit."""
FILLED_SHARE = 0.8
"""Of the bytes of an interval, that such connections have to carry."""
DELAY_S = 0.025
LOSS_FRACTION = 0.02
LEAST_SEGMENTS = 50
"""Loss among fewer is chance."""
BACKLOG_S = 1.0
GROWING_BACKLOG_S = 0.25
GROWTH_SHARE = 0.1
"""Of the capacity, at which a backlog counts as growing."""
CONFIRM_S = 0.15
CLEAR_S = 0.5


class ConnectionSample(Struct, frozen=True, kw_only=True):
    """One look at one connection. Counters start with the connection; `key` is never used for another one."""

    key: int
    acked_bytes: int
    sent_segments: int = 0
    retransmitted_segments: int = 0
    rtt_s: float = 0.0
    min_rtt_s: float = 0.0
    queued_bytes: int = 0
    """In the socket, sent or not, and not acknowledged."""
    notsent_bytes: int = 0
    app_limited: bool = True
    busy_s: float = 0.0
    held_back_s: float = 0.0
    """Part of `busy_s` in which the receiver's window or the send buffer was the limit."""


class LinkFigures(Struct, frozen=True, kw_only=True):
    """The state of one direction of a link, as one mover sees it."""

    used_bytes_per_s: float = 0.0
    capacity_bytes_per_s: float = 0.0
    """0 where it was neither configured nor measured."""
    filled: bool = False
    """Whether the network was the limit over the last interval: `used_bytes_per_s` is then all that it carries."""
    loss_fraction: float = 0.0
    rtt_s: float = 0.0
    min_rtt_s: float = 0.0
    backlog_bytes: int = 0
    connections: int = 0
    congested: bool = False
    reason: str = ""
    """Of the congestion."""

    @property
    def queueing_delay_s(self) -> float:
        return max(0.0, self.rtt_s - self.min_rtt_s)


class _Interval(Struct, frozen=True):
    duration_s: float
    acked_bytes: int
    sent_segments: int
    retransmitted_segments: int
    filled: bool


class Verdict:
    """Congested or not, with hysteresis. Pure."""

    def __init__(self) -> None:
        self.congested = False
        self.reason = ""
        self._since_s: float | None = None
        """Since when the signals say the other thing than the verdict."""

    def look(self, now_s: float, signals: dict[str, float]) -> None:
        """signals: each by its name, as a share of its limit."""
        strongest = max(signals, key=lambda name: signals[name])
        against = signals[strongest] < 0.5 if self.congested else signals[strongest] >= 1.0
        if not against:
            self._since_s = None
            if self.congested and signals[strongest] >= 1.0:
                self.reason = strongest
            return
        if self._since_s is None:
            self._since_s = now_s
        if now_s - self._since_s >= (CLEAR_S if self.congested else CONFIRM_S):
            self.congested = not self.congested
            self.reason = strongest if self.congested else ""
            self._since_s = None


class LinkEstimator:
    """One direction of one link. Not thread-safe."""

    def __init__(self, configured_bytes_per_s: float = 0.0, configured_rtt_s: float = 0.0) -> None:
        """Of the configuration, 0 where it does not tell."""
        self._capacity = LinkCapacity(configured_bytes_per_s)
        self._rtt_s = self._min_rtt_s = configured_rtt_s
        self._measured_rtt = False
        self._before: dict[int, ConnectionSample] = {}
        self._before_s: float | None = None
        self._window: deque[_Interval] = deque()
        self._backlogs: deque[tuple[float, int]] = deque()
        self._verdict = Verdict()
        self.figures = LinkFigures(capacity_bytes_per_s=configured_bytes_per_s, rtt_s=configured_rtt_s)
        """As of the last `look`."""

    def look(self, now_s: float, samples: Iterable[ConnectionSample], backlog_bytes: int) -> LinkFigures:
        """Take in all connections that stand, and how much is ready to be sent or on its way. Times must not go back;
        a look at the time of the last one changes nothing."""
        seen = {sample.key: sample for sample in samples}
        if self._before_s is None:
            self._before, self._before_s = seen, now_s
            return self.figures
        duration_s = now_s - self._before_s
        if duration_s <= 0:
            return self.figures
        interval = self._interval(seen, duration_s)
        self._round_trips(seen)
        self._before, self._before_s = seen, now_s
        self._window.append(interval)
        while sum(one.duration_s for one in self._window) - self._window[0].duration_s >= WINDOW_S:
            self._window.popleft()
        used = _rate(self._window)
        self._measure(now_s)
        self._backlogs.append((now_s, backlog_bytes))
        while len(self._backlogs) > 2 and now_s - self._backlogs[1][0] >= WINDOW_S:
            self._backlogs.popleft()
        capacity = self._capacity.at(now_s)
        sent = sum(one.sent_segments for one in self._window)
        again = sum(one.retransmitted_segments for one in self._window)
        loss = min(1.0, again / sent) if sent else 0.0
        self._verdict.look(now_s, self._signals(now_s, capacity, loss, sent, backlog_bytes))
        self.figures = LinkFigures(
            used_bytes_per_s=used,
            capacity_bytes_per_s=capacity,
            filled=interval.filled,
            loss_fraction=loss,
            rtt_s=self._rtt_s,
            min_rtt_s=self._min_rtt_s,
            backlog_bytes=backlog_bytes,
            connections=len(seen),
            congested=self._verdict.congested,
            reason=self._verdict.reason,
        )
        return self.figures

    def _interval(self, seen: dict[int, ConnectionSample], duration_s: float) -> _Interval:
        acked = limited = sent = again = 0
        for key, now in seen.items():
            before = self._before.get(key) or ConnectionSample(key=key, acked_bytes=0)
            moved = max(0, now.acked_bytes - before.acked_bytes)
            network_s = (now.busy_s - before.busy_s) - (now.held_back_s - before.held_back_s)
            had_more = now.notsent_bytes > 0 or not now.app_limited
            acked += moved
            limited += moved if had_more and network_s >= BUSY_SHARE * duration_s else 0
            sent += max(0, now.sent_segments - before.sent_segments)
            again += max(0, now.retransmitted_segments - before.retransmitted_segments)
        return _Interval(duration_s, acked, sent, again, acked > 0 and limited >= FILLED_SHARE * acked)

    def _round_trips(self, seen: dict[int, ConnectionSample]) -> None:
        """The mean over connections that moved, weighted by what they moved. At rest, no queue is known of."""
        weight = total = 0.0
        for key, now in seen.items():
            if now.rtt_s <= 0:
                continue
            least_s = now.min_rtt_s or now.rtt_s
            self._min_rtt_s = min(self._min_rtt_s, least_s) if self._measured_rtt else least_s
            self._measured_rtt = True
            before = self._before.get(key)
            moved = now.acked_bytes - (before.acked_bytes if before is not None else 0)
            if moved > 0:
                weight += moved
                total += moved * now.rtt_s
        self._rtt_s = total / weight if weight else self._min_rtt_s

    def _measure(self, now_s: float) -> None:
        """Learn from the latest intervals of one kind, filled or not, once they are long enough for a mean."""
        latest: list[_Interval] = []
        for interval in reversed(self._window):
            if interval.filled != self._window[-1].filled:
                return
            latest.append(interval)
            if sum(one.duration_s for one in latest) >= AVERAGE_S:
                break
        else:
            return
        learn = self._capacity.filled if latest[0].filled else self._capacity.at_least
        learn(now_s, _rate(latest))

    def _signals(self, now_s: float, capacity: float, loss: float, sent: int, backlog: int) -> dict[str, float]:
        delay_s = self._rtt_s - self._min_rtt_s
        signals = {
            "delay": delay_s / max(DELAY_S, self._min_rtt_s),
            "loss": loss / LOSS_FRACTION if sent >= LEAST_SEGMENTS else 0.0,
            "backlog": 0.0,
        }
        if capacity > 0:
            first_s, first = self._backlogs[0]
            span_s = now_s - first_s
            growing = span_s >= CONFIRM_S and (backlog - first) / span_s > GROWTH_SHARE * capacity
            signals["backlog"] = backlog / capacity / (GROWING_BACKLOG_S if growing else BACKLOG_S)
        return signals


def _rate(intervals: Iterable[_Interval]) -> float:
    listed = list(intervals)
    return sum(one.acked_bytes for one in listed) / sum(one.duration_s for one in listed)
