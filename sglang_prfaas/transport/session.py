"""The life of one request's transfer, at either end, as state machines: no sockets, no memory, a clock passed in.

    outgoing   WAITING --expect--> READY --start--> SENDING --done--> DONE
    incoming   EXPECTING --first chunk--> RECEIVING --last byte--> DONE
    both       any but DONE --fail--> FAILED

FAILED and DONE are final. Nothing is read from an outgoing transfer's pages and nothing written to an incoming one's
once it is final (page fencing): whoever copies does so between `pin` and `unpin`, which a transfer that ends waits for.
No copy may wait for anything while it holds a pin.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Sequence

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.admission import Admission
from sglang_prfaas.transport.framing import ChunkHeader
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.messages import Expect
from sglang_prfaas.transport.streams import RangeSet

MAX_FRAGMENTS = 1 << 16
"""Separate byte ranges remembered per stream; a peer that leaves more gaps than this is refused."""


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

TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.READY, State.FAILED}),
    State.READY: frozenset({State.SENDING, State.DONE, State.FAILED}),
    State.SENDING: frozenset({State.DONE, State.FAILED}),
    State.EXPECTING: frozenset({State.RECEIVING, State.DONE, State.FAILED}),
    State.RECEIVING: frozenset({State.DONE, State.FAILED}),
    State.DONE: frozenset(),
    State.FAILED: frozenset(),
}
"""Every change of state there is. READY to DONE and EXPECTING to DONE: a request of which nothing is to be sent."""


class Transfer:
    """What both ends have in common. `lock` fences the pages; all methods but `poll_timeout` are called under it."""

    def __init__(self, room: int, clock: Clock, state: State) -> None:
        self.room = room
        self.lock = threading.Lock()
        self._unpinned = threading.Condition(self.lock)
        self._pins = 0
        self._ending = False
        self._late = 0
        """Calls that wait for the end."""
        self.reason = ""
        self.peer_knows = False
        """Whether the peer has been told of a failure, or told us of it."""
        self.bytes = 0
        """Bytes sent or received so far, payload only and as they lie in memory, each counted once."""
        self.wire_bytes = 0
        """The same as they were on the wire: fewer where they were encoded."""
        self.codec = "raw"
        """Encoding of full-attention items in its session."""
        self.moves = 0
        """How often items have moved to other slots since they were queued. Outgoing transfers only."""
        self.resent_chunks = 0
        """Chunks on their way more than once: outgoing ones sent again, incoming ones that were there already."""
        self.corrupt_chunks = 0
        """Chunks whose checksum was wrong on arrival."""
        self.created_s = clock.now_s()
        self.progress_s = self.created_s
        self.first_byte_s = 0.0
        self.last_byte_s = 0.0
        self._clock = clock
        self._state = state

    @property
    def state(self) -> State:
        """Where the transfer stands; changes only along `TRANSITIONS`."""
        return self._state

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        state = self._state
        return state is not State.DONE and state is not State.FAILED

    def pin(self) -> bool:
        """Begin a copy; takes the lock itself. Returns False, and nothing may be touched, where the transfer has ended
        or is about to."""
        with self.lock:
            if self._ending or not self.live:
                return False
            self._pins += 1
            return True

    def unpin(self) -> None:
        """The copy is over; takes the lock itself."""
        with self.lock:
            self._pins -= 1
            if self._ending and not self._pins:
                self._unpinned.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; takes the lock itself. Returns whether it has come."""
        with self.lock:
            self._late += 1
            self._unpinned.wait_for(lambda: not self.live, timeout_s)
            self._late -= 1
            return not self.live

    def fail(self, reason: str) -> bool:
        """End the transfer, once no copy runs; the first reason is kept. Returns whether this call ended it."""
        return self._end(State.FAILED, reason)

    def _end(self, state: State, reason: str = "") -> bool:
        """Enter a final state when the last copy is over. Returns whether this call did."""
        if self._ending and self.live:
            self._late += 1
            self._unpinned.wait_for(lambda: not self.live)
            self._late -= 1
        if self._state in FINAL:
            return False
        self._ending = True
        while self._pins:
            self._unpinned.wait()
        self._enter(state)
        self.reason = reason
        if self._late:
            self._unpinned.notify_all()
        return True

    def _enter(self, state: State) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} to {state}"
        self._state = state

    def _progress(self, length: int, wire_bytes: int | None) -> None:
        now = self._clock.now_s()
        if not self.first_byte_s:
            self.first_byte_s = now
        self.last_byte_s = self.progress_s = now
        self.bytes += length
        self.wire_bytes += length if wire_bytes is None else wire_bytes


class OutgoingTransfer(Transfer):
    """A request on the prefill side: waits until decode says what it expects, then sends."""

    def __init__(self, room: int, clock: Clock, share: int = 0) -> None:
        super().__init__(room, clock, State.WAITING)
        self.share = share
        """Which of the decode ranks that this prefill rank serves it goes to; 0 where there is one."""
        self.expected: Expect | None = None
        self.ready_s = 0.0
        self.started_s = 0.0
        self.last_queued = False
        self.queued_bytes = 0
        """Bytes that were put on the way, sent or not."""
        self.acknowledged_bytes = 0
        self._awaited_bytes: list[int] = []
        """Acknowledged bytes that calls wait for."""
        self.read_receipts: Callable[[Callable[[], bool]], None] | None = None
        """Where one connection has what was sent last: reads its receipts on the calling thread until the condition
        holds, or for a moment; else another thread does. To be called once."""
        self._admission: Admission[OutgoingTransfer] | None = None
        self._expected_bytes = 0
        self._queued = 0
        self._sent = 0
        self._items: list[list[RangeSet]] = []

    def expect(self, message: Expect) -> bool:
        """Decode is ready. Returns False, and changes nothing, where the transfer has ended or a decode rank has
        asked for it already: a second one cannot end the transfer of the first."""
        if self._state is not State.WAITING:
            return False
        self.expected = message
        self._items = [[] for _ in message.counts]
        self._enter(State.READY)
        self.ready_s = self.progress_s = self._clock.now_s()
        return True

    def goes_over(self, admission: Admission[OutgoingTransfer], nbytes: int) -> None:
        """Decode is ready for so many bytes, over a link that has to have room for them."""
        self._admission, self._expected_bytes = admission, nbytes

    @property
    def admitted(self) -> bool:
        """Whether there is room for it on its link; from the first call on it waits for that."""
        if self._admission is None or not self.live:
            return True
        self._admission.ask(self, self._expected_bytes, self.ready_s)
        return self._admission.admits(self)

    def _enter(self, state: State) -> None:
        super()._enter(state)
        if self._admission is not None:
            if state is State.SENDING:
                self._admission.start(self, self._expected_bytes)
            elif state in FINAL:
                self._admission.end(self)

    def start(self, kv_items: int) -> None:
        """Prefill knows how many full-attention pages it will send; must be what decode reserved."""
        if self._state is not State.READY or self.expected is None:
            return
        if kv_items != self.expected.counts[0]:
            self.fail(f"prefill would send {kv_items} pages, decode reserved {self.expected.counts[0]}")
            return
        self._enter(State.SENDING)
        self.started_s = self.progress_s = self._clock.now_s()

    def queue(
        self, component: int, first_item: int, items: int, chunks: int, buffers: Sequence[int] = (0,), of: int = 1
    ) -> bool:
        """Chunks of a component are about to be put on the way: its items in `buffers`, of `of` that it has. Returns
        False where the transfer has ended; ends it where it was not started, where decode expects fewer items, or where
        some of them were queued before."""
        if not self.live:
            return False
        if self._state is not State.SENDING or self.expected is None:
            self.fail(f"items of component {component} were sent before decode asked for them")
            return False
        if component >= len(self._items) or first_item + items > self.expected.counts[component]:
            self.fail(f"prefill has more items of component {component} than decode reserved")
            return False
        queued = self._items[component] or [RangeSet() for _ in range(of)]
        self._items[component] = queued
        for buffer in buffers:
            if queued[buffer].add(first_item, first_item + items) != items:
                self.fail(f"items {first_item} to {first_item + items} of component {component} were sent twice")
                return False
        self._queued += chunks
        return True

    def finish(self) -> None:
        """Nothing more will be queued; ends the transfer where decode expects more than there was."""
        self.last_queued = True
        self.progress_s = self._clock.now_s()
        if self._state is State.SENDING and self._missing():
            self.fail(self._missing())

    def sent(self, length: int, wire_bytes: int | None = None, *, again: bool = False) -> None:
        """A chunk left for the socket, for the first time or `again`: its bytes in memory, and on the wire where they
        are others."""
        if again:
            self.resent_chunks += 1
            return
        self._sent += 1
        self._progress(length, wire_bytes)

    def acknowledged(self, length: int) -> None:
        """Decode has a chunk in place."""
        self.acknowledged_bytes += length
        if self._admission is not None:
            self._admission.acknowledged(self, length)
        self.progress_s = self._clock.now_s()
        if self._awaited_bytes and self.acknowledged_bytes >= min(self._awaited_bytes):
            self._unpinned.notify_all()

    def wait_acknowledged(self, nbytes: int, timeout_s: float) -> bool:
        """Wait until decode has so many bytes in place, or the end; takes the lock itself. Returns whether it has
        come."""

        def has_come() -> bool:
            return self.acknowledged_bytes >= nbytes or not self.live

        read, self.read_receipts = self.read_receipts, None
        if read is not None:
            read(has_come)
        with self.lock:
            if has_come():
                return True
            self._late += 1
            self._awaited_bytes.append(nbytes)
            came = self._unpinned.wait_for(has_come, timeout_s)
            self._awaited_bytes.remove(nbytes)
            self._late -= 1
            return came

    @property
    def all_sent(self) -> bool:
        """Whether everything there is has left for the sockets."""
        return self.last_queued and self._sent == self._queued

    def done(self) -> None:
        """Decode says that it has every byte. Ends the transfer as failed where that cannot be."""
        if not self.live:
            return
        if self.expected is None or self._missing():
            self.fail(f"decode reported the end too early: {self._missing() or 'it has not asked for anything'}")
            return
        if self._end(State.DONE):
            self.progress_s = self._clock.now_s()

    def _missing(self) -> str:
        """Which items decode expects that were never queued, or an empty string."""
        if self.expected is None:
            return ""
        for component, (queued, count) in enumerate(zip(self._items, self.expected.counts, strict=True)):
            fewest = min((items.total for items in queued), default=0)
            if fewest != count:
                return f"prefill sent {fewest} items of component {component}, decode reserved {count}"
        return ""

    def poll_timeout(self, waiting_s: float, transfer_s: float) -> str:
        """Why the transfer has taken too long, or an empty string. `waiting_s`: until decode is ready; `transfer_s`:
        without progress once everything was computed."""
        idle_s = self._clock.now_s() - self.progress_s
        if self._state is State.WAITING and idle_s > waiting_s:
            return f"decode did not ask for the request within {waiting_s:g} s"
        if self._state is State.READY and self._admission is not None and idle_s > self._admission.timeout_s:
            return "" if self.admitted else self._admission.refusal()
        if self._state is State.SENDING and self.last_queued and idle_s > transfer_s:
            return f"no progress for {transfer_s:g} s, {self.bytes} bytes were sent"
        return ""


class Claim:
    """Bytes of a transfer that one data connection fills. Until it ends, no other connection writes there."""

    __slots__ = ("busy", "header", "revoked", "transfer")

    def __init__(self, transfer: IncomingTransfer, header: ChunkHeader) -> None:
        self.transfer = transfer
        self.header = header
        self.revoked = False
        self.busy = False

    def overlaps(self, other: ChunkHeader) -> bool:
        ours = self.header
        return (
            (ours.component, ours.buffer) == (other.component, other.buffer)
            and ours.offset < other.offset + other.length
            and other.offset < ours.offset + ours.length
        )

    def pin(self) -> bool:
        """Begin to write; as `Transfer.pin`. False too where another connection has taken the bytes over."""
        with self.transfer.lock:
            if self.revoked or self.transfer._ending or not self.transfer.live:
                return False
            self.busy = True
            self.transfer._pins += 1
            return True

    def unpin(self) -> None:
        """The write is over."""
        with self.transfer.lock:
            self.busy = False
            self.transfer._pins -= 1
            if self.revoked or self.transfer._ending:
                self.transfer._unpinned.notify_all()


class IncomingTransfer(Transfer):
    """A request on the decode side: which bytes have arrived of those it reserved pages for.

    A transfer of which no byte is expected is DONE from the start."""

    def __init__(self, room: int, transfer_id: int, layout: Layout, counts: tuple[int, ...], clock: Clock) -> None:
        super().__init__(room, clock, State.EXPECTING)
        self.transfer_id = transfer_id
        self.counts = counts
        self.expected_bytes = layout.request_bytes(counts)
        self.duplicate_bytes = 0
        self._claims: list[Claim] = []
        self._sizes = tuple(
            tuple(size * count for size in component.item_bytes)
            for component, count in zip(layout.components, counts, strict=True)
        )
        self._ranges: dict[tuple[int, int], RangeSet] = {}
        if self.expected_bytes == 0:
            self._enter(State.DONE)

    @property
    def kv_bytes(self) -> int:
        """Of the bytes expected, those of full-attention items."""
        return sum(self._sizes[0])

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
        ranges = self._ranges.get((header.component, header.buffer))
        if ranges is not None and len(ranges) >= MAX_FRAGMENTS:
            raise ProtocolError(
                f"more than {MAX_FRAGMENTS} separate ranges of component {header.component}, buffer {header.buffer}"
            )

    def claim(self, header: ChunkHeader) -> Claim | None:
        """A data connection is about to bring a chunk. Returns None where its bytes are in place already. Another
        connection that has begun with the same bytes loses them: the sender has given that one up.

        Raises ProtocolError for a chunk outside of what was expected, or one that is cut otherwise than before."""
        self.check(header)
        ranges = self._ranges.get((header.component, header.buffer))
        covered = ranges.covered(header.offset, header.offset + header.length) if ranges is not None else 0
        if covered == header.length:
            self.duplicate_bytes += header.length
            self.resent_chunks += 1
            return None
        if covered:
            raise ProtocolError(
                f"chunk at offset {header.offset} of component {header.component}, buffer {header.buffer} was sent "
                "before in another size"
            )
        for other in [claim for claim in self._claims if claim.overlaps(header)]:
            other.revoked = True
            self._claims.remove(other)
            while other.busy:
                self._unpinned.wait()
        claim = Claim(self, header)
        self._claims.append(claim)
        return claim

    def give_up(self, claim: Claim) -> None:
        """The claim ends without its bytes: the chunk was corrupt, or its connection is lost."""
        if not claim.revoked:
            self._claims.remove(claim)
            claim.revoked = True

    def received(self, claim: Claim, wire_bytes: int | None = None) -> bool:
        """The claim's bytes are in place and were checked. Returns whether they were the last ones missing.
        wire_bytes: what they took on the wire, where that is another number."""
        self.give_up(claim)
        if not self.live:
            return False
        header = claim.header
        ranges = self._ranges.setdefault((header.component, header.buffer), RangeSet())
        self._progress(ranges.add(header.offset, header.offset + header.length), wire_bytes)
        if self._state is State.EXPECTING:
            self._enter(State.RECEIVING)
        return self.bytes == self.expected_bytes and self._end(State.DONE)

    def poll_timeout(self, waiting_s: float, transfer_s: float) -> str:
        """Why the transfer has taken too long, or an empty string. `waiting_s`: until the first byte, and between the
        bytes of two prefill chunks; the longer of both limits holds, as prefill may still be computing."""
        idle_s = self._clock.now_s() - self.progress_s
        limit_s = max(waiting_s, transfer_s)
        if self.live and idle_s > limit_s:
            return f"no byte for {limit_s:g} s, {self.bytes} of {self.expected_bytes} arrived"
        return ""
