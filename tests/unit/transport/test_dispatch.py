"""Who sends a session's chunks: a connection's own thread, or one that borrows an idle connection."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.errors import PeerGoneError
from sglang_prfaas.transport.outbox import Task, at_hand
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.send_session import DataLink, Dispatch
from sglang_prfaas.transport.streams import ChunkSpan

DEADLINE_S = 60.0


def task(offset: int = 0) -> Task:
    transfer = OutgoingTransfer(7, VirtualClock())
    return Task(transfer, ChunkSpan(0, 0, offset, 1), np.empty(0, np.int64), 0, at_hand)


def link(*, used_up: bool = False) -> DataLink:
    connection: Any = SimpleNamespace(used_up=used_up)
    sending: Any = None
    return DataLink(0, connection, sending, 0.0)


class Own:
    """A connection's own thread, which takes one chunk."""

    def __init__(self, dispatch: Dispatch, of: DataLink) -> None:
        self.took: list[Task | None] = []
        self.thread = threading.Thread(target=lambda: self.took.append(dispatch.take(of, wait=True)))
        self.thread.start()

    def ended(self) -> bool:
        self.thread.join(DEADLINE_S)
        return not self.thread.is_alive()


@contextmanager
def idle(of: DataLink) -> Iterator[tuple[Dispatch, Own]]:
    """A session whose only connection is idle."""
    dispatch = Dispatch()
    own = Own(dispatch, of)
    while not dispatch._idle:
        threading.Event().wait(0.001)
    try:
        yield dispatch, own
    finally:
        dispatch.close()
        assert own.ended()


def test_an_idle_connection_is_borrowed_and_its_thread_sleeps_on() -> None:
    with idle(of := link()) as (dispatch, own):
        one = task()
        assert dispatch.borrow([one]) is of
        assert (one.attempts, list(of.lane.flying)) == (1, [one])
        assert dispatch.borrow([task()]) is None, "somebody else has it"
        dispatch.give_back(of, [])
        assert dispatch.borrow([task(1)]) is of
        dispatch.give_back(of, [])
        assert own.thread.is_alive()


def test_what_waits_goes_first() -> None:
    dispatch = Dispatch()
    waiting = task()
    dispatch.put(waiting.transfer, [waiting], 1, 0.0)
    dispatch._idle.append(link())
    assert dispatch.borrow([task()]) is None


def test_a_connection_whose_keys_are_used_up_is_its_threads() -> None:
    with idle(link(used_up=True)) as (dispatch, _):
        assert dispatch.borrow([task()]) is None


@pytest.mark.parametrize("how", ["begun", "failed", "lost", "closed", "waiting"])
def test_a_borrowed_connection_that_is_not_idle_again_wakes_its_thread(how: str) -> None:
    with idle(of := link()) as (dispatch, own):
        one, other = task(), task(1)
        assert dispatch.borrow([one]) is of
        if how == "failed":
            of.failure = PeerGoneError("gone")
        elif how == "lost":
            assert dispatch.lose(of) == 1
        elif how == "closed":
            dispatch.close()
        elif how == "waiting":
            dispatch.put(other.transfer, [other], 1, 0.0)
        dispatch.give_back(of, [one] if how == "begun" else [])
        assert own.ended()
        assert own.took == ([other] if how == "waiting" else [None])
        assert of.begun == ([one] if how == "begun" else [])


def test_chunks_that_are_not_sent_after_all_are_not_counted() -> None:
    with idle(of := link()) as (dispatch, _):
        tasks = [task(at) for at in range(3)]
        assert dispatch.borrow(tasks) is of
        dispatch.untake(of, 2)
        assert list(of.lane.flying) == tasks[:1]
        dispatch.give_back(of, [])


@contextmanager
def all_idle(count: int, *, sparing: bool) -> Iterator[tuple[Dispatch, dict[DataLink, Own]]]:
    """A session with so many connections, all idle, and their threads."""
    dispatch = Dispatch()
    dispatch.sparing = sparing
    owns = {of: Own(dispatch, of) for of in (link() for _ in range(count))}
    try:
        while len(dispatch._idle) < count:
            threading.Event().wait(0.001)
        yield dispatch, owns
    finally:
        dispatch.close()
        assert all(own.ended() for own in owns.values())


def put(dispatch: Dispatch, count: int) -> int:
    """Add so many chunks of a transfer; returns how many connections are idle then."""
    tasks = [task(at) for at in range(count)]
    dispatch.put(tasks[0].transfer, tasks, count, 0.0)
    return len(dispatch._idle)


def test_every_put_lets_two_go_on() -> None:
    with all_idle(5, sparing=False) as (dispatch, _):
        assert put(dispatch, 9) == 3
        assert put(dispatch, 1) == 1


def test_a_sparing_one_lets_two_go_on_and_more_where_one_waits_long() -> None:
    with all_idle(5, sparing=True) as (dispatch, owns):
        assert put(dispatch, 9) == 3
        assert put(dispatch, 1) == 3, "two are at it"
        busy = [of for of in owns if of not in dispatch._idle]
        assert all(owns[of].ended() for of in busy)
        dispatch.share(busy[0])
        assert len(dispatch._idle) == 2, "one waits, another takes its place"
        dispatch.share(busy[0])
        assert len(dispatch._idle) == 1, "each time that it waits"
        assert put(dispatch, 1) == 1, "of the others two are at it"


def test_a_lost_connection_does_not_count_as_one_that_works() -> None:
    with all_idle(3, sparing=True) as (dispatch, owns):
        assert put(dispatch, 2) == 1
        for of in [of for of in owns if of not in dispatch._idle]:
            dispatch.lose(of)
        assert len(dispatch._idle) == 0, "what they had begun waits again"
