"""One request's transfer at the prefill end, see `transfer.py`: what was queued, sent and acknowledged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sglang_prfaas.clock import Clock
from sglang_prfaas.transport.admission import Admission
from sglang_prfaas.transport.messages import Expect
from sglang_prfaas.transport.streams import RangeSet
from sglang_prfaas.transport.transfer import FINAL, State, Transfer


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
