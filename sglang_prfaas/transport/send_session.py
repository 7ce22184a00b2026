"""A decode rank as a prefill rank sees it: its data connections, its transfers, and the chunks on their way to it."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import PeerError
from sglang_prfaas.transport.codec.session import SessionCodec
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.framing import ReceiptReader
from sglang_prfaas.transport.health import Health
from sglang_prfaas.transport.mailbox import Mailbox
from sglang_prfaas.transport.messages import Hello
from sglang_prfaas.transport.outbox import Lane, Outbox, Task
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.part_memory import SessionView
from sglang_prfaas.transport.send_lane import SendLane

RECEIPT_READ_BYTES = 4096
AT_ONCE = 2
"""Connections that begin with what is to be sent."""


class DataLink:
    """One data connection of a session, with the thread that sends on it. While that thread is idle, another may borrow
    the connection from `Dispatch` and send."""

    def __init__(self, index: int, connection: Connection, sending: SendLane, now_s: float) -> None:
        self.index = index
        self.connection = connection
        self.lane = Lane(index)
        self.sending = sending
        """The batch that is being sent. Whose turn it is to send owns it."""
        self.begun: list[Task] = []
        """What a borrower has begun to send; the connection's own thread goes on with it."""
        self.failure: PeerError | None = None
        """What a borrower met; the connection's own thread deals with it."""
        self.receipts = ReceiptReader()
        self.reader = threading.Lock()
        """Held by who waits for receipts and reads them by itself."""
        self.reading = threading.Lock()
        """Held while receipts are read."""
        self.read_buffer = memoryview(bytearray(RECEIPT_READ_BYTES))
        self.read_until: Callable[[Callable[[], bool]], None] | None = None
        """See `OutgoingTransfer.read_receipts`."""
        self.read_held: Callable[[Callable[[], bool]], None] | None = None
        """The same, for one who holds `reader` already, and nobody else looks at the connection."""
        self.renewing = False
        """Whether it is the last word on it that it be dialled again."""
        self.moved: tuple[int, int, int] = (0, 0, 0)
        self.moved_s = now_s
        self._gate = threading.Lock()
        self._gate.acquire()

    def sleep(self) -> None:
        """Wait for `wake`. By its thread."""
        self._gate.acquire()

    def wake(self) -> None:
        """Once for every `sleep`."""
        self._gate.release()


class Dispatch:
    """Hands the chunks of a session to those of its connections that can send: the ones that were busy last first,
    `AT_ONCE` of them, and one more whenever one has to wait for its socket."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.outbox = Outbox()
        self._idle: list[DataLink] = []
        self._working: set[DataLink] = set()
        """Those that are neither idle nor waiting long."""
        self.sparing = False
        """Whether no more than `AT_ONCE` work at a time, unless one waits long. On one host more of them only take
        turns with Python's lock and the processor's cache; on a link each may be as fast as it can."""
        self._closed = False

    def put(self, transfer: OutgoingTransfer, tasks: list[Task], remaining_bytes: int, now_s: float) -> None:
        """Add chunks; dropped where the session is closed."""
        with self.lock:
            if not self._closed:
                self.outbox.put(transfer, tasks, remaining_bytes, now_s)
                self._wake(AT_ONCE - len(self._working) if self.sparing else AT_ONCE)

    def take(self, link: DataLink, *, wait: bool) -> Task | None:
        """The next chunk for a connection; None once it is lost, or where none is there and `wait` is false."""
        while True:
            with self.lock:
                if self._closed or link.lane.lost or link.begun or link.failure:
                    return None
                task = self.outbox.take(link.lane)
                if task is not None or not wait:
                    self._working.add(link)
                    return task
                self._working.discard(link)
                self._idle.append(link)
            link.sleep()

    def borrow(self, tasks: list[Task]) -> DataLink | None:
        """An idle connection for chunks that need not wait, which the caller is to send; `give_back` must follow. None
        where they have to."""
        with self.lock:
            if self._closed or self.outbox.count or not self._idle or self._idle[-1].connection.used_up:
                return None
            link = self._idle.pop()
            self.outbox.pass_by(link.lane, tasks)
            return link

    def give_back(self, link: DataLink, begun: list[Task]) -> None:
        """A borrowed connection is idle again, or its own thread has to go on: with `begun`, which has yet to leave."""
        with self.lock:
            link.begun = begun
            if begun or link.failure or link.lane.lost or self._closed or self.outbox.count:
                link.wake()
            else:
                self._idle.append(link)

    def untake(self, link: DataLink, count: int = 1) -> None:
        """The chunks taken last are not sent."""
        with self.lock:
            if not link.lane.lost:
                self.outbox.untake(link.lane, count)

    def share(self, link: DataLink) -> None:
        """A connection waits for its socket, or may wait for a device: let another go on."""
        with self.lock:
            self._working.discard(link)
            self._wake(1)

    def acknowledged(self, link: DataLink, number: int) -> list[Task]:
        """As `Outbox.acknowledged`."""
        with self.lock:
            found = self.outbox.acknowledged(link.lane, number)
            if not self.sparing:
                self._wake(1)
            return found

    def again(self, link: DataLink, number: int) -> Task | None:
        """As `Outbox.again`."""
        with self.lock:
            found = self.outbox.again(link.lane, number)
            self._wake(1)
            return found

    def lose(self, link: DataLink) -> int:
        """The connection is lost: its thread ends, its chunks go again. Returns how many. Idempotent."""
        with self.lock:
            count = self.outbox.lose(link.lane)
            self._working.discard(link)
            if link in self._idle:
                self._idle.remove(link)
                link.wake()
            self._wake(2)
            return count

    def drop(self, transfer: OutgoingTransfer) -> None:
        """Forget the chunks of a transfer that has ended."""
        with self.lock:
            self.outbox.drop(transfer)

    def close(self) -> None:
        """Drop everything; whoever waits gets None."""
        with self.lock:
            self._closed = True
            self.outbox.clear()
            self._wake(len(self._idle), always=True)

    def __len__(self) -> int:
        with self.lock:
            return self.outbox.count

    def _wake(self, count: int, *, always: bool = False) -> None:
        for _ in range(count if always else min(count, self.outbox.count)):
            if not self._idle:
                return
            link = self._idle.pop()
            self._working.add(link)
            link.wake()


class SendSession:
    """One decode rank: its identity on the control socket, its data connections, its transfers by transfer id.

    `links`, `transfers`, `health` and `closed` are guarded by `SendTable`'s lock; `mailbox` and `descriptor` belong to
    the control loop."""

    def __init__(
        self,
        identity: bytes,
        hello: Hello,
        config: TransportConfig,
        now_s: float,
        view: SessionView,
        site: str = "",
        codec: SessionCodec | None = None,
        curve_key: str = "",
        asked: Hello | None = None,
    ) -> None:
        """hello: with as many connections as there will be; asked: as it came. config: as it holds for the link."""
        self.identity = identity
        self.hello = hello
        self.asked = asked or hello
        self.config = config
        self.view = view
        self.site = site
        """The site that the decode rank has proved to be of; empty without keys."""
        self.curve_key = curve_key
        """The key that it has proved it with."""
        self.codec = codec or SessionCodec()
        self.token = secrets.token_bytes(16)
        self.opened_s = now_s
        self.links: dict[int, DataLink] = {}
        self.transfers: dict[int, OutgoingTransfer] = {}
        self.dispatch = Dispatch()
        self.health = Health(config, hello.connections, now_s)
        self.mailbox = Mailbox(now_s)
        self.closed = False
        self.descriptor = -1
        """Of the control connection that its last message came over."""

    def __str__(self) -> str:
        return f"decode {self.hello.site}/{self.hello.server}" if self.hello.site else f"decode {self.hello.server}"
