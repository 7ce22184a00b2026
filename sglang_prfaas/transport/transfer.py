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

from sglang_prfaas.clock import Clock


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
