"""The chunks of a session that are to be sent, and those that were sent and not yet acknowledged. No sockets, no lock.

All data connections take from one queue, so that none has a backlog of its own (work stealing). A chunk
belongs to its connection (a `Lane`) until it is acknowledged there; a lost connection gives its chunks back.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable

from msgspec import Struct

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.memory import Indices
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.sharing import Sharing, ShortestFirst
from sglang_prfaas.transport.streams import ChunkSpan

MAX_ATTEMPTS = 16
"""How often a chunk is sent before its transfer is given up."""


def at_hand() -> None:
    """`ready` of memory that can be read at any time."""


class Task(Struct, eq=False):
    """One chunk to send: `span` of items `first_item`... at `indices`, which may be read once `ready` has returned."""

    transfer: OutgoingTransfer
    span: ChunkSpan
    indices: Indices
    first_item: int
    ready: Callable[[], None]
    attempts: int = 0
    """How often it has been sent, or begun."""
    wire_bytes: int = 0
    """Its payload's length when it was sent last: less than `span.length` where it was encoded."""


class Lane:
    """One data connection: what was sent on it and not acknowledged, in order. Numbers count its chunks from 0."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.first = 0
        """Number of the oldest chunk that is not acknowledged."""
        self.flying: deque[Task | None] = deque()
        """None for one that was asked for again."""
        self.lost = False

    def __repr__(self) -> str:
        return f"Lane({self.index}, {self.first} acknowledged, {len(self.flying)} flying)"


class _Waiting:
    """The chunks of one transfer that wait."""

    __slots__ = ("arrived_s", "remaining_bytes", "tasks")

    def __init__(self, arrived_s: float) -> None:
        self.arrived_s = arrived_s
        self.remaining_bytes = 0
        self.tasks: deque[Task] = deque()


class Outbox:
    """Not thread-safe. `sharing` says which transfer goes first."""

    def __init__(self, sharing: Sharing | None = None) -> None:
        self._sharing = sharing or ShortestFirst()
        self._waiting: dict[OutgoingTransfer, _Waiting] = {}
        self._order: list[tuple[float, int, OutgoingTransfer]] = []
        """A heap; entries of transfers that were dropped, or whose key has changed since, are passed over."""
        self._ties = itertools.count()
        self.count = 0
        """Chunks that wait."""

    def put(self, transfer: OutgoingTransfer, tasks: Iterable[Task], remaining_bytes: int, now_s: float) -> None:
        """Add chunks of a transfer, which has `remaining_bytes` yet to be sent, these included."""
        waiting = self._waiting.get(transfer)
        if waiting is None:
            waiting = self._waiting[transfer] = _Waiting(now_s)
        before = len(waiting.tasks)
        waiting.tasks.extend(tasks)
        waiting.remaining_bytes = remaining_bytes
        self.count += len(waiting.tasks) - before
        self._rank(transfer, waiting)

    def take(self, lane: Lane) -> Task | None:
        """The next chunk, which is `lane`'s from now on; None where nothing waits."""
        while self._order:
            key, _, transfer = self._order[0]
            waiting = self._waiting.get(transfer)
            if waiting is None or not waiting.tasks or key != self._key(waiting):
                heapq.heappop(self._order)
                continue
            task = waiting.tasks.popleft()
            self.count -= 1
            waiting.remaining_bytes -= task.span.length
            heapq.heappop(self._order)
            if waiting.tasks:
                self._rank(transfer, waiting)
            task.attempts += 1
            lane.flying.append(task)
            return task
        return None

    def pass_by(self, lane: Lane, tasks: Iterable[Task]) -> None:
        """Chunks that need not wait are `lane`'s from now on, as after `take`. Only where nothing waits."""
        for task in tasks:
            task.attempts += 1
            lane.flying.append(task)

    def untake(self, lane: Lane, count: int = 1) -> None:
        """The chunks taken last are not sent: their transfer has ended."""
        for _ in range(count):
            lane.flying.pop()

    def acknowledged(self, lane: Lane, number: int) -> list[Task]:
        """All chunks of a lane before `number` are dealt with; returns them. Raises ProtocolError for a number that
        cannot be."""
        if not lane.first <= number <= lane.first + len(lane.flying):
            raise ProtocolError(
                f"chunks up to {number} acknowledged, {lane.first} to {lane.first + len(lane.flying)} can be"
            )
        done = [lane.flying.popleft() for _ in range(number - lane.first)]
        lane.first = number
        return [task for task in done if task is not None]

    def again(self, lane: Lane, number: int) -> Task | None:
        """A chunk arrived corrupt: it waits again, before all others of its transfer. Returns it, or None where it is
        not wanted any more, or has been sent too often: see `attempts`. Raises ProtocolError as `acknowledged`."""
        if not lane.first <= number < lane.first + len(lane.flying):
            raise ProtocolError(f"chunk {number} asked for again, {lane.first + len(lane.flying)} were sent")
        task = lane.flying[number - lane.first]
        lane.flying[number - lane.first] = None
        if task is not None:
            self._back(task)
        return task

    def lose(self, lane: Lane) -> int:
        """The connection is lost: what it has not delivered waits again. Returns how many chunks. Idempotent."""
        lane.lost = True
        lost = [task for task in lane.flying if task is not None]
        lane.flying.clear()
        for task in reversed(lost):
            self._back(task)
        return len(lost)

    def drop(self, transfer: OutgoingTransfer) -> None:
        """Forget the chunks of a transfer that has ended."""
        waiting = self._waiting.pop(transfer, None)
        if waiting is not None:
            self.count -= len(waiting.tasks)

    def clear(self) -> None:
        """Forget everything."""
        self._waiting.clear()
        self._order.clear()
        self.count = 0

    def _back(self, task: Task) -> None:
        if not task.transfer.live:
            return
        waiting = self._waiting.get(task.transfer)
        if waiting is None:
            waiting = self._waiting[task.transfer] = _Waiting(task.transfer.progress_s)
        waiting.tasks.appendleft(task)
        waiting.remaining_bytes += task.span.length
        self.count += 1
        self._rank(task.transfer, waiting)

    def _key(self, waiting: _Waiting) -> float:
        return self._sharing.key(waiting.remaining_bytes, waiting.arrived_s)

    def _rank(self, transfer: OutgoingTransfer, waiting: _Waiting) -> None:
        heapq.heappush(self._order, (self._key(waiting), next(self._ties), transfer))
