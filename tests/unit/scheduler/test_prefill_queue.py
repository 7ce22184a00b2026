"""The queue of one prefill server, as its sender sees it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.scheduler.prefill_queue import PrefillQueue


def test_requests_are_worked_off_one_after_the_other() -> None:
    queue = PrefillQueue()
    assert queue.wait_s(5.0) == 0.0
    first, second = queue.add(10.0, 2.0), queue.add(10.5, 3.0)
    assert queue.wait_s(10.5) == pytest.approx(4.5)
    assert queue.finish(12.0, first) == pytest.approx(2.0)
    assert queue.wait_s(12.0) == pytest.approx(3.0)
    assert queue.finish(15.0, second) == pytest.approx(3.0), "since the one before was answered"
    assert queue.wait_s(15.0) == 0.0
    assert queue.finish(16.0, second) is None


def test_a_slow_server_moves_what_is_behind() -> None:
    queue = PrefillQueue()
    first = queue.add(0.0, 1.0)
    queue.add(0.0, 1.0)
    assert queue.finish(4.0, first) == pytest.approx(4.0)
    assert queue.wait_s(4.0) == pytest.approx(1.0)


def test_the_transfer_is_not_the_servers_work() -> None:
    queue = PrefillQueue()
    first, second = queue.add(0.0, 1.0, after_s=0.5), queue.add(0.0, 1.0, after_s=0.5)
    assert queue.finish(1.5, first) == pytest.approx(1.0)
    assert queue.wait_s(1.5) == pytest.approx(0.5)
    assert queue.finish(2.5, second) == pytest.approx(1.0)


def test_a_server_that_gives_nothing_back_looks_busy() -> None:
    queue = PrefillQueue()
    queue.add(0.0, 1.0)
    assert queue.wait_s(1.5) == 0.0, "a little late is usual"
    assert queue.wait_s(5.0) == pytest.approx(3.25)
    assert queue.wait_s(9.0) == pytest.approx(7.25)
    queue.add(9.0, 1.0)
    queue.add(9.0, 1.0)
    assert queue.wait_s(11.5) > 9.0, "those behind it do not get done meanwhile"


def test_a_request_that_is_given_up_frees_its_place() -> None:
    queue = PrefillQueue()
    first, second = queue.add(0.0, 4.0), queue.add(0.0, 4.0)
    queue.drop(1.0, second)
    assert queue.wait_s(1.0) == pytest.approx(3.0)
    queue.drop(1.0, first)
    queue.drop(1.0, first)
    assert queue.wait_s(1.0) == 0.0


@given(st.lists(st.tuples(st.sampled_from(["add", "finish", "drop"]), st.floats(0, 5), st.integers(0, 9)), max_size=60))
def test_waits_are_finite_and_an_empty_queue_has_none(steps: list[tuple[str, float, int]]) -> None:
    queue = PrefillQueue()
    now_s = 0.0
    held: list[int] = []
    for what, seconds, pick in steps:
        now_s += seconds / 3
        if what == "add":
            held.append(queue.add(now_s, seconds))
        elif held:
            number = held.pop(pick % len(held))
            if what == "finish":
                queue.finish(now_s, number)
            else:
                queue.drop(now_s, number)
        assert 0.0 <= queue.wait_s(now_s) < 1e4
        assert len(queue) == len(held)
    for number in held:
        queue.drop(now_s, number)
    assert queue.wait_s(now_s) == 0.0
