"""A decode rank as a prefill rank sees it: its data connections, and the chunks that wait to be sent to it."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

from msgspec import Struct

from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.memory import Indices
from sglang_prfaas.transport.messages import Hello
from sglang_prfaas.transport.part_memory import SessionView
from sglang_prfaas.transport.session import OutgoingTransfer
from sglang_prfaas.transport.streams import ChunkSpan


class Task(Struct, frozen=True, eq=False):
    """One chunk to send: `span` of items `first_item`... at `indices`, which may be read once `ready` has returned."""

    transfer: OutgoingTransfer
    span: ChunkSpan
    indices: Indices
    first_item: int
    ready: Callable[[], None]


class TaskQueue:
    """Chunks of several transfers, taken one from each in turn: none waits behind the whole of another."""

    def __init__(self) -> None:
        self._queues: OrderedDict[OutgoingTransfer, deque[Task]] = OrderedDict()
        self._condition = threading.Condition()
        self._closed = False

    def put(self, tasks: list[Task]) -> None:
        """Add chunks; dropped where the queue is closed."""
        with self._condition:
            if self._closed:
                return
            for task in tasks:
                queue = self._queues.get(task.transfer)
                if queue is None:
                    queue = self._queues[task.transfer] = deque()
                queue.append(task)
            self._condition.notify(len(tasks))

    def take(self) -> Task | None:
        """The next chunk, waiting for one; None once the queue is closed."""
        with self._condition:
            while not self._queues and not self._closed:
                self._condition.wait()
            if self._closed:
                return None
            transfer, queue = next(iter(self._queues.items()))
            task = queue.popleft()
            if queue:
                self._queues.move_to_end(transfer)
            else:
                del self._queues[transfer]
            return task

    def drop(self, transfer: OutgoingTransfer) -> None:
        """Forget the chunks of a transfer that has ended."""
        with self._condition:
            self._queues.pop(transfer, None)

    def close(self) -> None:
        """Drop everything; whoever waits gets None."""
        with self._condition:
            self._closed = True
            self._queues.clear()
            self._condition.notify_all()

    def __len__(self) -> int:
        with self._condition:
            return sum(len(queue) for queue in self._queues.values())


class SendSession:
    """One decode rank: its identity on the control socket, its data connections, its transfers by transfer id.

    `connections`, `transfers` and `closed` are guarded by the mover's lock."""

    def __init__(self, identity: bytes, hello: Hello, now_s: float, view: SessionView, site: str = "") -> None:
        self.identity = identity
        self.hello = hello
        self.view = view
        self.site = site
        """The site that the decode rank has proved to be of; empty without keys."""
        self.token = secrets.token_bytes(16)
        self.opened_s = now_s
        """Since when it may have been without some of its data connections."""
        self.seen_s = now_s
        self.connections: dict[int, Connection] = {}
        self.transfers: dict[int, OutgoingTransfer] = {}
        self.tasks = TaskQueue()
        self.closed = False

    def __str__(self) -> str:
        return f"decode {self.hello.site}/{self.hello.server}" if self.hello.site else f"decode {self.hello.server}"
