"""The queue of one prefill server as seen from where requests are sent: what it has in work, and until when.

Requests are taken to be computed one after the other, in the order in which they were sent. Every end that comes
earlier or later than predicted moves what is behind it. A server that does not give back the first of them when it
should is overdue: it may be stuck, slow, or unable to send, and is taken to need as long again.
"""

from __future__ import annotations

from msgspec import Struct

_GRACE_S = 0.25
_GRACE_SHARE = 0.5


class Ticket(Struct):
    """One request in the queue."""

    sent_s: float
    work_s: float
    """Predicted prefill time."""
    end_s: float
    """Predicted end, without what has moved the queue since."""
    after_s: float
    """What its answer takes beyond its prefill: the exposed part of its transfer."""
    tokens: int


class PrefillQueue:
    """Predicted ends of the requests of one server. Pure: the time is passed in."""

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}
        self._next = 0
        self._end_s = 0.0
        self._moved_s = 0.0
        self._last_done_s = float("-inf")

    def __len__(self) -> int:
        return len(self._tickets)

    @property
    def tokens(self) -> int:
        """Tokens to compute of all requests that are not answered."""
        return sum(ticket.tokens for ticket in self._tickets.values())

    def add(self, now_s: float, work_s: float, after_s: float = 0.0, tokens: int = 0) -> int:
        """A request is sent, whose answer comes `after_s` after its prefill. Returns its number."""
        self._end_s = max(now_s, self._end_s) + work_s
        self._next += 1
        self._tickets[self._next] = Ticket(now_s, work_s, self._end_s - self._moved_s, after_s, tokens)
        return self._next

    def finish(self, now_s: float, number: int) -> float | None:
        """A request is answered.

        Returns the seconds for which the server worked on it: since it was sent, or since the one before was answered.
        None for a request that is not there any more.
        """
        ticket = self._tickets.pop(number, None)
        if ticket is None:
            return None
        done_s = now_s - ticket.after_s
        self._move(now_s, done_s - ticket.end_s - self._moved_s)
        busy_s = done_s - max(ticket.sent_s, self._last_done_s)
        self._last_done_s = max(self._last_done_s, done_s)
        return busy_s

    def drop(self, now_s: float, number: int) -> None:
        """A request is given up: what was not computed of it is not waited for."""
        ticket = self._tickets.pop(number, None)
        if ticket is None:
            return
        left_s = max(0.0, min(ticket.work_s, ticket.end_s + self._moved_s - now_s))
        for other in self._tickets.values():
            if other.end_s > ticket.end_s:
                other.end_s -= left_s
        self._end_s -= left_s
        self._move(now_s, 0.0)

    def wait_s(self, now_s: float) -> float:
        """Seconds until a new request would be computed."""
        if not self._tickets:
            return 0.0
        first = next(iter(self._tickets.values()))
        first_end_s = first.end_s + self._moved_s
        if now_s <= first_end_s:
            return max(0.0, self._end_s - now_s)
        overdue_s = now_s - first_end_s - first.after_s - _GRACE_S - _GRACE_SHARE * first.work_s
        return max(0.0, self._end_s - first_end_s) + max(0.0, overdue_s)

    def _move(self, now_s: float, by_s: float) -> None:
        if not self._tickets:
            self._end_s, self._moved_s = now_s, 0.0
            return
        by_s = max(by_s, now_s - self._end_s)  # what is left cannot have ended before now
        self._end_s += by_s
        self._moved_s += by_s
