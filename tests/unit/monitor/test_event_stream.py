"""Order, gaps and restarts of a publisher's batches, with a model of the publisher in place of sockets."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.monitor.event_stream import Action, Apply, AskReplay, EventStream, Reset


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock()


@pytest.fixture
def stream(clock: VirtualClock) -> EventStream:
    return EventStream(clock, can_replay=True)


def at_batch(stream: EventStream, last: int) -> EventStream:
    """The stream after batches 0 to `last`."""
    stream.connected()
    stream.replay_ended()
    for seq in range(last + 1):
        assert stream.live(seq, b"%d" % seq) == [Apply(seq, b"%d" % seq)]
    return stream


def test_starts_with_all_that_can_be_replayed(stream: EventStream) -> None:
    assert stream.connected() == [AskReplay(0)]
    assert stream.live(9, b"9") == []
    assert stream.replayed(7, b"7") == [Apply(7, b"7")]
    assert stream.replayed(8, b"8") == [Apply(8, b"8")]
    assert stream.replayed(9, b"9") == [Apply(9, b"9")]
    assert stream.replay_ended() == []
    assert stream.live(10, b"10") == [Apply(10, b"10")]
    assert (stream.gaps, stream.resets) == (0, 0)


def test_gap_is_closed_by_a_replay(stream: EventStream) -> None:
    at_batch(stream, 4)
    assert stream.live(7, b"7") == [AskReplay(4)]
    assert stream.live(8, b"8") == []
    assert stream.replayed(4, b"4") == []
    assert stream.replayed(5, b"5") == [Apply(5, b"5")]
    assert stream.replayed(6, b"6") == [Apply(6, b"6")]
    assert stream.replayed(7, b"7") == [Apply(7, b"7")]
    assert stream.replay_ended() == [Apply(8, b"8")]
    assert (stream.gaps, stream.resets) == (1, 0)


def test_gap_longer_than_the_replay_buffer(stream: EventStream) -> None:
    at_batch(stream, 4)
    assert stream.live(20, b"20") == [AskReplay(4)]
    assert stream.replayed(15, b"15") == []
    assert stream.replayed(16, b"16") == []
    assert stream.replay_ended() == [Reset("the replay starts at batch 15, batch 4 is gone"), AskReplay(0)]
    assert [stream.replayed(seq, b"") for seq in (15, 16)] == [[Apply(15, b"")], [Apply(16, b"")]]


def test_restart_seen_from_the_number(stream: EventStream) -> None:
    at_batch(stream, 4)
    assert stream.live(0, b"new") == [Reset("batch 0 after 4: the publisher was restarted"), Apply(0, b"new")]
    assert stream.live(1, b"1") == [Apply(1, b"1")]
    at_batch(EventStream(VirtualClock(), can_replay=True), 4)


def test_restart_with_its_first_batches_missed(stream: EventStream) -> None:
    at_batch(stream, 4)
    assert stream.live(2, b"new") == [Reset("batch 2 after 4: the publisher was restarted"), AskReplay(0)]


def test_restart_hidden_by_equal_numbers(stream: EventStream) -> None:
    at_batch(stream, 4)
    assert stream.connected() == [AskReplay(4)]
    assert stream.replayed(4, b"new 4") == []
    assert stream.live(5, b"new 5") == []
    assert stream.replay_ended() == [Reset("batch 4 differs: the publisher was restarted"), AskReplay(0)]
    assert stream.replayed(0, b"new 0") == [Apply(0, b"new 0")]


def test_restart_with_nothing_published_yet(stream: EventStream) -> None:
    at_batch(stream, 4)
    assert stream.connected() == [AskReplay(4)]
    assert stream.replay_ended() == [Reset("batch 4 is gone: the publisher was restarted"), AskReplay(0)]
    assert stream.replay_ended() == []
    assert stream.live(0, b"0") == [Apply(0, b"0")]


def test_reconnected_with_nothing_missed(stream: EventStream) -> None:
    at_batch(stream, 4)
    assert stream.connected() == [AskReplay(4)]
    assert stream.replayed(4, b"4") == []
    assert stream.replay_ended() == []
    assert stream.live(5, b"5") == [Apply(5, b"5")]
    assert stream.resets == 0


def test_no_answer(stream: EventStream, clock: VirtualClock) -> None:
    at_batch(stream, 4)
    stream.live(7, b"7")
    assert stream.tick() == []
    for _ in range(2):
        clock.advance(5)
        assert stream.tick() == [AskReplay(4)]
    clock.advance(5)
    assert stream.tick() == [Reset("no replay within 5.0 s, 3 times"), Apply(7, b"7")]
    assert stream.live(8, b"8") == [Apply(8, b"8")]


def test_what_is_held_is_bounded(clock: VirtualClock) -> None:
    stream = EventStream(clock, can_replay=True, max_held_bytes=10)
    stream.connected()
    assert stream.live(0, b"12345678") == []
    assert stream.live(1, b"12345678") == [Reset("more than 10 bytes came while a replay was under way")]
    assert stream.live(2, b"2") == [Apply(2, b"2")]


def test_without_replay(clock: VirtualClock) -> None:
    stream = EventStream(clock, can_replay=False)
    assert stream.connected() == []
    assert stream.live(5, b"5") == [Apply(5, b"5")]
    assert stream.live(8, b"8") == [Reset("batches 6 to 7 are missing, no replay"), Apply(8, b"8")]
    assert stream.live(2, b"2") == [Reset("batch 2 after 8: the publisher was restarted"), Apply(2, b"2")]
    assert stream.connected() == [Reset("reconnected, and the publisher offers no replay")]


def test_a_batch_that_its_replay_overtook(stream: EventStream) -> None:
    stream.connected()
    assert [stream.replayed(seq, b"%d" % seq) for seq in (0, 1)] == [[Apply(0, b"0")], [Apply(1, b"1")]]
    assert stream.replay_ended() == []
    assert stream.live(0, b"0") == stream.live(1, b"1") == []
    assert stream.live(2, b"2") == [Apply(2, b"2")]
    assert stream.resets == 0


class Publisher:
    """SGLang's publisher and the network around it: live batches may be lost, answers come late and on a connection of
    their own."""

    def __init__(self, stream: EventStream, buffer_steps: int) -> None:
        self.stream = stream
        self.buffer_steps = buffer_steps
        self.incarnation = 0
        self.batches: list[bytes] = []
        self.live = deque[tuple[int, bytes]]()
        self.answers = deque[tuple[str, int, bytes]]()
        self.applied: list[Apply] = []
        self.do(stream.connected())

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Apply):
                self.applied.append(action)
            elif isinstance(action, Reset):
                self.applied.clear()
            else:
                self.answers = deque([("ask", action.start_seq, b"")])

    def publish(self, lost: bool) -> None:
        self.batches.append(b"%d/%d" % (self.incarnation, len(self.batches)))
        if not lost:
            self.live.append((len(self.batches) - 1, self.batches[-1]))

    def restart(self) -> None:
        self.incarnation += 1
        self.batches = []
        self.live.clear()
        self.do(self.stream.connected())

    def deliver(self) -> None:
        if self.live:
            self.do(self.stream.live(*self.live.popleft()))

    def answer(self) -> None:
        kind, seq, payload = self.answers.popleft() if self.answers else ("", 0, b"")
        if kind == "replayed":
            self.do(self.stream.replayed(seq, payload))
        elif kind == "end":
            self.do(self.stream.replay_ended())
        elif kind == "ask":
            oldest = max(0, len(self.batches) - self.buffer_steps)
            numbered = list(enumerate(self.batches))[oldest:]
            self.answers.extend(("replayed", at, batch) for at, batch in numbered if at >= seq)
            self.answers.append(("end", -1, b""))


STEPS = ["publish", "publish", "lose", "deliver", "deliver", "answer", "answer", "answer", "restart"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=80), st.integers(1, 12), st.booleans())
def test_converges_to_a_suffix_of_the_history(script: list[str], buffer_steps: int, answers_first: bool) -> None:
    publisher = Publisher(EventStream(VirtualClock(), can_replay=True), buffer_steps)
    for step in script:
        match step:
            case "publish" | "lose":
                publisher.publish(lost=step == "lose")
            case "deliver":
                publisher.deliver()
            case "answer":
                publisher.answer()
            case "restart":
                publisher.restart()
    publisher.publish(lost=False)
    while publisher.live or publisher.answers:
        if publisher.answers and (answers_first or not publisher.live):
            publisher.answer()
        else:
            publisher.deliver()
    applied = [batch.payload for batch in publisher.applied]
    assert applied == publisher.batches[len(publisher.batches) - len(applied) :], "in order, without a gap"
    assert len(applied) >= min(buffer_steps, len(publisher.batches)), "at least what can be replayed"
