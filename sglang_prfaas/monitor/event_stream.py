"""The order of one publisher's KV events: duplicates, gaps, restarts. A state machine without sockets.

Every batch has a sequence number that starts at 0 with the publisher, which keeps its last batches for replay (10,000
by default). There is no snapshot, and nothing names the publisher's incarnation. So:

- A gap is closed by a replay that starts with the last batch already applied: only if that one comes back unchanged
  is the publisher still the same, with nothing lost in between.
- Anything else means that a part of the history is missing: what the index holds of that server is dropped, and built
  again from all that the publisher can replay. It then knows less than the server holds, never more.

Source: SGLang 0.5.23, disaggregation/kv_events.py (ZmqEventPublisher).
"""

from __future__ import annotations

from msgspec import Struct

from sglang_prfaas.clock import Clock

_MAX_ATTEMPTS = 3


class Apply(Struct, frozen=True):
    """Take this batch in."""

    seq: int
    payload: bytes


class Reset(Struct, frozen=True):
    """Drop everything known of this publisher's cache."""

    reason: str


class AskReplay(Struct, frozen=True):
    """Ask for all batches from this number on. Answers to earlier questions are void."""

    start_seq: int


Action = Apply | Reset | AskReplay


class _Replay(Struct):
    deadline_s: float
    verify: bool  # the first batch must be the last one applied
    failed: str = ""


class EventStream:
    """Turns what arrives, in any order, into actions. Every method returns the actions to do now, in order.

    Live batches that come during a replay wait for its end, at most `max_held_bytes` of them. Without `can_replay`
    (the publisher has no replay endpoint), every gap, restart and reconnection starts from nothing.
    """

    def __init__(
        self, clock: Clock, *, can_replay: bool, replay_timeout_s: float = 5.0, max_held_bytes: int = 64 << 20
    ) -> None:
        self.gaps = 0
        """Times that live batches were missing."""
        self.resets = 0
        """Times that everything known was dropped."""
        self._clock = clock
        self._can_replay = can_replay
        self._replay_timeout_s = replay_timeout_s
        self._max_held_bytes = max_held_bytes
        self._next: int | None = None  # None: any batch may be the first
        self._last_payload = 0
        self._replay: _Replay | None = None
        self._replayed: dict[int, int] = {}  # hashes of batches that may still come live, by number
        self._attempts = 0
        self._held: list[Apply] = []
        self._held_bytes = 0

    def connected(self) -> list[Action]:
        """The connection was made, for the first time or again: batches may be missing, and the publisher another."""
        self._drop_held()  # perhaps of a former publisher; the replay has it if not
        if self._can_replay:
            self._attempts = 0
            return self._ask()
        return [] if self._next is None else [self._reset("reconnected, and the publisher offers no replay")]

    def live(self, seq: int, payload: bytes) -> list[Action]:
        """A batch came on the subscription."""
        batch = Apply(seq, payload)
        if self._replay is not None:
            return self._hold(batch)
        if self._next is None or seq == self._next:
            self._replayed.clear()
            return self._apply(batch)
        if seq > self._next:
            self.gaps += 1
            if self._can_replay:
                self._hold(batch)
                return self._ask()
            return [self._reset(f"batches {self._next} to {seq - 1} are missing, no replay"), *self._apply(batch)]
        if self._replayed.get(seq) == hash(payload):
            return []  # the replay overtook it
        actions: list[Action] = [self._reset(f"batch {seq} after {self._next - 1}: the publisher was restarted")]
        if seq == 0 or not self._can_replay:
            return actions + self._apply(batch)
        self._hold(batch)
        return actions + self._ask()

    def replayed(self, seq: int, payload: bytes) -> list[Action]:
        """A batch came in answer to the last question."""
        replay = self._replay
        if replay is None or replay.failed:
            return []
        replay.deadline_s = self._clock.now_s() + self._replay_timeout_s
        if replay.verify:
            replay.verify = False
            if seq + 1 != self._next:
                replay.failed = f"the replay starts at batch {seq}, batch {(self._next or 0) - 1} is gone"
            elif hash(payload) != self._last_payload:
                replay.failed = f"batch {seq} differs: the publisher was restarted"
            return []
        if self._next is None or seq == self._next:
            self._replayed[seq] = hash(payload)
            return self._apply(Apply(seq, payload))
        replay.failed = f"the replay jumps from batch {self._next - 1} to {seq}"
        return []

    def replay_ended(self) -> list[Action]:
        """The answer is complete."""
        replay = self._replay
        if replay is None:
            return []
        if replay.verify and not replay.failed:
            replay.failed = f"batch {(self._next or 0) - 1} is gone: the publisher was restarted"
        if replay.failed:
            self._attempts += 1
            if self._attempts > _MAX_ATTEMPTS:
                return self._give_up(replay.failed)
            return [self._reset(replay.failed), *self._ask()]
        self._replay = None
        if self._next is None:
            self._next = 0  # nothing to replay: nothing was published
        return self._release()

    def tick(self) -> list[Action]:
        """To be called about every second: asks again where no answer came, and does without after three times."""
        if self._replay is None or self._clock.now_s() < self._replay.deadline_s:
            return []
        self._attempts += 1
        if self._attempts < _MAX_ATTEMPTS:
            return self._ask()
        return self._give_up(f"no replay within {self._replay_timeout_s} s, {_MAX_ATTEMPTS} times")

    def _apply(self, batch: Apply) -> list[Action]:
        self._next, self._last_payload = batch.seq + 1, hash(batch.payload)
        return [batch]

    def _reset(self, reason: str) -> Reset:
        self.resets += 1
        self._next = None
        self._replayed.clear()
        return Reset(reason)

    def _ask(self) -> list[Action]:
        last = self._next - 1 if self._next else None
        self._replay = _Replay(self._clock.now_s() + self._replay_timeout_s, verify=last is not None)
        return [AskReplay(last or 0)]

    def _hold(self, batch: Apply) -> list[Action]:
        if self._held and batch.seq <= self._held[-1].seq:  # what was held is the former incarnation's
            self._drop_held()
            if self._replay is not None and not self._replay.failed:
                self._replay.failed = f"batch {batch.seq} came again: the publisher was restarted"
        self._held.append(batch)
        self._held_bytes += len(batch.payload)
        if self._held_bytes <= self._max_held_bytes:
            return []
        self._drop_held()
        return self._give_up(f"more than {self._max_held_bytes} bytes came while a replay was under way")

    def _drop_held(self) -> None:
        self._held, self._held_bytes = [], 0

    def _release(self) -> list[Action]:
        """Apply what came during the replay and was not in it."""
        held, actions = self._held, list[Action]()
        self._drop_held()
        for index, batch in enumerate(held):
            if self._next is None or batch.seq == self._next:
                actions += self._apply(batch)
            elif batch.seq > self._next:
                self.gaps += 1
                self._attempts += 1
                if self._attempts > _MAX_ATTEMPTS:
                    self._attempts = 0
                    return [*actions, self._reset(f"batches before {batch.seq} are missing after a replay")]
                for later in held[index:]:
                    self._hold(later)
                return actions + self._ask()
        self._attempts = 0
        return actions

    def _give_up(self, reason: str) -> list[Action]:
        """Go on with the live batches alone."""
        actions: list[Action] = [self._reset(reason)]
        self._replay, self._attempts = None, 0
        held = self._held
        self._drop_held()
        for batch in held:
            if self._next is not None and batch.seq != self._next:
                actions.append(self._reset(f"batches before {batch.seq} are missing"))
            actions += self._apply(batch)
        return actions
