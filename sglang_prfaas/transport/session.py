"""The life of one request's transfer, at either end, as state machines: no sockets, no memory, a clock passed in.

    outgoing   WAITING --expect--> READY --start--> SENDING --done--> DONE
    incoming   EXPECTING --first chunk--> RECEIVING --last byte--> DONE
    both       any but DONE --fail--> FAILED

FAILED and DONE are final. Nothing is read from an outgoing transfer's pages and nothing written to an incoming one's
once it is final: callers hold the transfer's lock while they copy and look at `live` first (page fencing).
"""

from __future__ import annotations

import enum
import threading

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.framing import ChunkHeader
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.messages import Expect
from sglang_prfaas.transport.streams import RangeSet


class State(enum.Enum):
    """Where a transfer stands."""

    WAITING = "waiting"
    READY = "ready"
    SENDING = "sending"
    EXPECTING = "expecting"
    RECEIVING = "receiving"
    DONE = "done"
    FAILED = "failed"


FINAL = frozenset({State.DONE, State.FAILED})


class Transfer:
    """What both ends have in common. `lock` fences the pages; all methods but `poll_timeout` are called under it."""

    def __init__(self, room: int, clock: Clock) -> None:
        self.room = room
        self.lock = threading.Lock()
        self.reason = ""
        self.bytes = 0
        """Bytes sent or received so far, payload only."""
        self.created_s = clock.now_s()
        self.progress_s = self.created_s
        self.first_byte_s = 0.0
        self.last_byte_s = 0.0
        self._clock = clock
        self.state = State.WAITING

    @property
    def live(self) -> bool:
        """Whether the pages may still be touched."""
        return self.state not in FINAL

    def fail(self, reason: str) -> bool:
        """End the transfer; the first reason is kept. Returns whether this call ended it."""
        if self.state in FINAL:
            return False
        self.state = State.FAILED
        self.reason = reason
        return True

    def _progress(self, length: int) -> None:
        now = self._clock.now_s()
        if not self.first_byte_s:
            self.first_byte_s = now
        self.last_byte_s = self.progress_s = now
        self.bytes += length


class OutgoingTransfer(Transfer):
    """A request on the prefill side: waits until decode says what it expects, then sends."""

    def __init__(self, room: int, clock: Clock) -> None:
        super().__init__(room, clock)
        self.expected: Expect | None = None
        self.ready_s = 0.0
        self.started_s = 0.0
        self.last_queued = False
        self._queued = 0
        self._sent = 0
        self._kv_items = 0

    def expect(self, message: Expect) -> None:
        """Decode is ready. A second one for the same room is a protocol error and fails the transfer."""
        if self.state is not State.WAITING:
            if self.live:
                self.fail(f"a second decode rank asked for room {self.room}")
            return
        self.expected = message
        self.state = State.READY
        self.ready_s = self.progress_s = self._clock.now_s()

    def start(self, kv_items: int) -> None:
        """Prefill knows how many full-attention pages it will send; must be what decode reserved."""
        if self.state is not State.READY or self.expected is None:
            return
        self._kv_items = self.expected.counts[0]
        if kv_items != self._kv_items:
            self.fail(f"prefill would send {kv_items} pages, decode reserved {self._kv_items}")
            return
        self.state = State.SENDING
        self.started_s = self.progress_s = self._clock.now_s()

    def queue(self, component: int, first_item: int, items: int, chunks: int) -> bool:
        """Chunks of a component were put on the way. Returns False, and fails, where decode expects fewer items."""
        if self.state is not State.SENDING or self.expected is None:
            return False
        if component >= len(self.expected.counts) or first_item + items > self.expected.counts[component]:
            self.fail(f"prefill has more items of component {component} than decode reserved")
            return False
        self._queued += chunks
        return True

    def sent(self, length: int) -> None:
        """A chunk left for the socket."""
        self._sent += 1
        self._progress(length)

    @property
    def all_sent(self) -> bool:
        """Whether everything there is has left for the sockets."""
        return self.last_queued and self._sent == self._queued

    def done(self) -> None:
        """Decode has every byte."""
        if self.live:
            self.state = State.DONE
            self.progress_s = self._clock.now_s()

    def poll_timeout(self, waiting_s: float, transfer_s: float) -> str:
        """Why the transfer has taken too long, or an empty string. `waiting_s`: until decode is ready; `transfer_s`:
        without progress once everything was computed."""
        idle_s = self._clock.now_s() - self.progress_s
        if self.state is State.WAITING and idle_s > waiting_s:
            return f"decode did not ask for the request within {waiting_s:g} s"
        if self.state is State.SENDING and self.last_queued and idle_s > transfer_s:
            return f"no progress for {transfer_s:g} s, {self.bytes} bytes were sent"
        return ""


class IncomingTransfer(Transfer):
    """A request on the decode side: which bytes have arrived of those it reserved pages for."""

    def __init__(self, room: int, transfer_id: int, layout: Layout, counts: tuple[int, ...], clock: Clock) -> None:
        super().__init__(room, clock)
        self.transfer_id = transfer_id
        self.counts = counts
        self.expected_bytes = layout.request_bytes(counts)
        self.duplicate_bytes = 0
        self.state = State.EXPECTING
        self._sizes = tuple(
            tuple(size * count for size in component.item_bytes)
            for component, count in zip(layout.components, counts, strict=True)
        )
        self._ranges: dict[tuple[int, int], RangeSet] = {}

    def check(self, header: ChunkHeader) -> None:
        """Raise ProtocolError for a chunk outside of what was expected, before any of its bytes is placed."""
        if header.component >= len(self._sizes) or header.buffer >= len(self._sizes[header.component]):
            raise ProtocolError(f"chunk for component {header.component}, buffer {header.buffer}, which do not exist")
        limit = self._sizes[header.component][header.buffer]
        if header.offset + header.length > limit:
            raise ProtocolError(
                f"chunk ends at byte {header.offset + header.length} of a stream of {limit} bytes (component "
                f"{header.component}, buffer {header.buffer})"
            )

    def received(self, header: ChunkHeader) -> bool:
        """The chunk's bytes are in place. Returns whether they were the last ones missing."""
        ranges = self._ranges.setdefault((header.component, header.buffer), RangeSet())
        new = ranges.add(header.offset, header.offset + header.length)
        self.duplicate_bytes += header.length - new
        self._progress(new)
        if self.state is State.EXPECTING:
            self.state = State.RECEIVING
        if self.bytes == self.expected_bytes and self.live:
            self.state = State.DONE
            return True
        return False

    def poll_timeout(self, waiting_s: float, transfer_s: float) -> str:
        """Why the transfer has taken too long, or an empty string. `waiting_s`: until the first byte, and between the
        bytes of two prefill chunks; `transfer_s` is not looked at while prefill may still be computing."""
        idle_s = self._clock.now_s() - self.progress_s
        limit_s = max(waiting_s, transfer_s)
        if self.live and idle_s > limit_s:
            return f"no byte for {limit_s:g} s, {self.bytes} of {self.expected_bytes} arrived"
        return ""
