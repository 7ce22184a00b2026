"""Both ends of a session over a link in memory, under a virtual clock: the outbox, the lanes, the mailboxes, the
transfers and the health of the live mover, and in place of sockets a link with bandwidth, delay, resets, cuts, stalls,
corrupt bytes, and control messages that get lost. The same seed does the same."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable

import numpy as np
from msgspec import Struct

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ChecksumError
from sglang_prfaas.transport.framing import ReceiptReader
from sglang_prfaas.transport.health import Health, backoff_s
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.mailbox import Mailbox, unseal
from sglang_prfaas.transport.messages import Abort, Done, Expect, Message, decode_to_prefill, encode
from sglang_prfaas.transport.outbox import MAX_ATTEMPTS, Lane, Outbox, Task
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.receive_lane import Placement, ReceiveLane
from sglang_prfaas.transport.send_lane import SendLane
from sglang_prfaas.transport.streams import cut
from tests.transport.rig import Memory, Slots, layout, some_slots

TICK_S = 0.25
CHUNK_BYTES = 4096
SEGMENT_BYTES = 1460 * 8
WINDOW_BYTES = 1 << 16
CONFIG = TransportConfig(heartbeat_interval_s=1.0, heartbeat_timeout_s=5.0, reconnect_timeout_s=10.0)


class Link(Struct, frozen=True):
    """What a link does; rates are chances for each segment or message."""

    bytes_per_s: float = 10e6
    delay_s: float = 0.01
    reset_rate: float = 0.0
    corrupt_rate: float = 0.0
    stall_rate: float = 0.0
    control_loss: float = 0.0
    cut_s: tuple[float, float] = (0.0, 0.0)
    """From when until when nothing passes, and every connection is lost."""


class Segment:
    """Takes the next bytes of a lane, so many at most."""

    def __init__(self) -> None:
        self.data = bytearray()

    def send(self, views: list[memoryview], *, more: bool = False) -> int:
        taken = b"".join(views)[: SEGMENT_BYTES - len(self.data)]
        self.data += taken
        return len(taken)

    def send_with(self, act: Callable[[int], int]) -> int:
        raise AssertionError("there is no descriptor")


class Wire:
    """One data connection, from one dial to the next."""

    def __init__(self, index: int, end: Session) -> None:
        self.index = index
        self.up = True
        self.lane = Lane(index)
        self.receipts = ReceiptReader()
        self.sending = SendLane(end.source.rank, CHUNK_BYTES, end.unreadable)
        self.batch: list[Task] = []
        self.receiving = ReceiveLane(end.target.rank, CHUNK_BYTES, end.placements.get, end.complete)
        self.flying_bytes = 0
        self.free_s = 0.0
        """When the last segment has arrived, or will have."""


class Session:
    """Both ends. `run` returns when every transfer has ended, or raises AssertionError."""

    def __init__(self, link: Link, seed: int, connections: int = 3) -> None:
        self.link = link
        self.rng = random.Random(seed)
        self.clock = VirtualClock()
        self.layout = layout()
        self.source, self.target = Memory(self.layout, 1), Memory(self.layout, None)
        self.outbox = Outbox()
        self.placements: dict[int, Placement] = {}
        self.outgoing: dict[int, OutgoingTransfer] = {}
        self.sources: dict[int, Slots] = {}
        self.health = {end: Health(CONFIG, connections, 0.0) for end in ("prefill", "decode")}
        self.mail = {end: Mailbox(0.0) for end in ("prefill", "decode")}
        self.failure = ""
        self.resets = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = itertools.count()
        self.wires = [Wire(index, self) for index in range(connections)]
        for health in self.health.values():
            for index in range(connections):
                health.connected(index, 0.0)
        self._after(TICK_S, self._tick)
        if link.cut_s[1]:
            self._after(link.cut_s[0], self._reset_all)

    # --- the requests ---------------------------------------------------------------------------------------------

    def request(self, room: int, at_s: float, target: Slots, abort_s: float = 0.0) -> None:
        """Decode asks for a room; it gives the request up at `abort_s`, where given."""
        self.outgoing[room] = OutgoingTransfer(room, self.clock)
        self.sources[room] = some_slots(room, tuple(map(len, target)))

        def ask() -> None:
            counts = tuple(map(len, target))
            transfer = IncomingTransfer(room, room, self.layout, counts, self.clock)
            self.placements[room] = Placement(transfer, tuple(target))
            self._post(Expect(room, room, counts, 0))

        def give_up() -> None:
            with self.placements[room].transfer.lock:
                ended = self.placements[room].transfer.fail("the client has gone")
            if ended:
                self._post(Abort(room, "the client has gone", room))

        self._after(at_s, ask)
        if abort_s:
            self._after(at_s + abort_s, give_up)

    def complete(self, transfer: IncomingTransfer) -> None:
        self._post(Done(transfer.transfer_id, transfer.room))

    @staticmethod
    def unreadable(transfer: OutgoingTransfer, reason: str) -> None:
        raise AssertionError(f"room {transfer.room}: {reason}")

    def _act(self, message: Message) -> None:
        """Prefill, on what decode says."""
        assert isinstance(message, (Expect, Done, Abort))
        transfer = self.outgoing[message.room]
        if isinstance(message, Expect):
            assert transfer.expect(message)
            transfer.start(message.counts[0])
            for component, slots in enumerate(self.sources[message.room]):
                sizes = self.layout.components[component].item_bytes
                spans = list(cut(component, sizes, 0, len(slots), CHUNK_BYTES))
                assert transfer.queue(component, 0, len(slots), len(spans))
                tasks = [Task(transfer, span, slots, 0, lambda: None) for span in spans]
                self.outbox.put(transfer, tasks, self.layout.request_bytes(message.counts), self.clock.now_s())
            transfer.finish()
        elif isinstance(message, Done):
            transfer.done()
        else:
            transfer.fail(f"decode: {message.reason}")
        self._pump()

    # --- control --------------------------------------------------------------------------------------------------

    def _post(self, message: Message) -> None:
        self._carry("decode", self.mail["decode"].post(encode(message), self.clock.now_s()))

    def _carry(self, sender: str, envelope: bytes) -> None:
        """Over a control connection that may lose what it was given when it breaks."""
        if self._is_cut() or self.rng.random() < self.link.control_loss:
            return
        receiver = "prefill" if sender == "decode" else "decode"

        def arrive() -> None:
            number, acknowledged, body = unseal(envelope)
            now_s = self.clock.now_s()
            self.health[receiver].heard(now_s)
            if self.mail[receiver].accept(number, acknowledged, now_s) and number:
                self._act(decode_to_prefill(body))

        self._after(self.link.delay_s, arrive)

    def _tick(self) -> None:
        now_s = self.clock.now_s()
        for end, mail in self.mail.items():
            for envelope in mail.resend(now_s):
                self._carry(end, envelope)
            self._carry(end, mail.unnumbered(b""))
            why = self.health[end].verdict(now_s)
            if why and not self.failure:
                self._lose(f"{end}: {why}")
        self._after(TICK_S, self._tick)

    def _lose(self, reason: str) -> None:
        """Both ends find out, each by itself; here at one moment."""
        self.failure = reason
        self.outbox.clear()
        for transfer in [*self.outgoing.values(), *(item.transfer for item in self.placements.values())]:
            with transfer.lock:
                transfer.fail(reason)

    # --- data -----------------------------------------------------------------------------------------------------

    def _is_cut(self) -> bool:
        return self.link.cut_s[0] <= self.clock.now_s() < self.link.cut_s[1]

    def _pump(self) -> None:
        for wire in self.wires:
            while wire.up and wire.flying_bytes < WINDOW_BYTES and self._segment(wire):
                pass

    def _segment(self, wire: Wire) -> bool:
        """Put the next bytes of a connection on their way. Returns False where there are none."""
        segment = Segment()
        wire.sending.push(segment)
        if not segment.data:
            self._end_batch(wire)
            while not wire.sending.full and (task := self.outbox.take(wire.lane)) is not None:
                if wire.sending.add(task):
                    wire.batch.append(task)
                else:
                    self.outbox.untake(wire.lane)
            wire.sending.push(segment)
            if not segment.data:
                return False
        data = bytes(segment.data)
        if self.rng.random() < self.link.corrupt_rate:
            at = self.rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ (1 << self.rng.randrange(8))]) + data[at + 1 :]
        stall_s = self.rng.uniform(0.0, 1.0) if self.rng.random() < self.link.stall_rate else 0.0
        share = self.link.bytes_per_s / len(self.wires)
        wire.free_s = max(wire.free_s, self.clock.now_s()) + len(data) / share + stall_s
        wire.flying_bytes += len(data)
        self._after(wire.free_s - self.clock.now_s() + self.link.delay_s, lambda: self._arrive(wire, data))
        return True

    def _end_batch(self, wire: Wire) -> None:
        for task in wire.batch:
            task.transfer.sent(task.span.length, again=task.attempts > 1)
        wire.batch.clear()
        wire.sending.reset()

    def _arrive(self, wire: Wire, data: bytes) -> None:
        if not wire.up:
            return
        wire.flying_bytes -= len(data)
        if self._is_cut() or self.rng.random() < self.link.reset_rate:
            self._reset(wire)
            return
        self.health["decode"].heard(self.clock.now_s())
        try:
            wire.receiving.take(memoryview(data))
        except ChecksumError:
            self._reset(wire)
            return
        answers = wire.receiving.answers(idle=True)
        if answers:
            self._after(self.link.delay_s, lambda: self._answered(wire, answers))
        self._pump()

    def _answered(self, wire: Wire, answers: bytes) -> None:
        if not wire.up:
            return
        self.health["prefill"].heard(self.clock.now_s())
        for receipt in wire.receipts.feed(answers):
            if not receipt.again:
                for task in self.outbox.acknowledged(wire.lane, receipt.number):
                    task.transfer.acknowledged(task.span.length)
            else:
                task_again = self.outbox.again(wire.lane, receipt.number)
                if task_again is not None and task_again.attempts >= MAX_ATTEMPTS:
                    raise AssertionError("a chunk arrived corrupt too often for this link")
        self._pump()

    def _reset(self, wire: Wire) -> None:
        if not wire.up:
            return
        self.resets += 1
        wire.up = False
        self._end_batch(wire)
        self.outbox.lose(wire.lane)
        wire.receiving.lost()
        for health in self.health.values():
            health.disconnected(wire.index, self.clock.now_s())
        self._dial(wire.index, 0)
        self._pump()

    def _reset_all(self) -> None:
        for wire in list(self.wires):
            self._reset(wire)

    def _dial(self, index: int, attempt: int) -> None:
        def attempted() -> None:
            if self.failure:
                return
            if self._is_cut():
                self._dial(index, attempt + 1)
                return
            self.wires[index] = Wire(index, self)
            for health in self.health.values():
                health.connected(index, self.clock.now_s())
            self._pump()

        self._after(backoff_s(attempt, self.rng) + 2 * self.link.delay_s, attempted)

    # --- time -----------------------------------------------------------------------------------------------------

    def _after(self, seconds: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._events, (self.clock.now_s() + seconds, next(self._ties), lambda: (event(), None)[1]))

    def run(self, limit_s: float = 120.0) -> None:
        """Until every transfer has ended at both ends; checks that each is equal, or has failed with a reason."""
        while any(t.live for t in self.outgoing.values()) or len(self.placements) < len(self.outgoing):
            at_s, _, event = heapq.heappop(self._events)
            self.clock.advance(max(0.0, at_s - self.clock.now_s()))
            assert self.clock.now_s() < limit_s, f"not ended within {limit_s} s: {self.outgoing}"
            event()
        self._check()

    def _check(self) -> None:
        reserved = [np.zeros(len(buffers[0]), bool) for buffers in self.target.arrays]
        for room, item in self.placements.items():
            theirs, ours = item.transfer, self.outgoing[room]
            assert not theirs.live
            # Decode's word that it has everything can be lost with the session.
            assert theirs.reason or self.failure or theirs.state is ours.state, (room, theirs.state, ours.state)
            for component, slots in enumerate(item.indices):
                reserved[component][slots] = True
                if theirs.state.value != "done":
                    continue
                for source, target in zip(self.source.arrays[component], self.target.arrays[component], strict=True):
                    np.testing.assert_array_equal(source[self.sources[room][component]], target[slots])
        for component, buffers in enumerate(self.target.arrays):
            for buffer in buffers:
                assert not buffer[~reserved[component]].any(), "a byte outside of what was reserved"
        assert all(not transfer._pins for transfer in self.outgoing.values())
