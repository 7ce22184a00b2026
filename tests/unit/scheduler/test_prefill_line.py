"""Who waits in front of prefill servers, and who goes when."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.core.request import Route
from sglang_prfaas.scheduler.prefill_line import PrefillLine, ServerLoad

FREE, BUSY = ServerLoad(0.0, 0), ServerLoad(3.0, 50_000)


def line(**settings: Any) -> PrefillLine[str]:
    return PrefillLine(PolicyConfig(**{"feed_s": 0.25, "feed_tokens": 1000, "slo_ttft_s": 10.0, **settings}))


def add(it: PrefillLine[str], key: str, now_s: float = 0.0, route: Route = "local", needs_s: float = 1.0) -> None:
    it.add(key, route, now_s, local_s=needs_s, prfaas_s=needs_s, fixed=True)


@pytest.mark.parametrize(
    ("load", "room"),
    [
        (ServerLoad(0.25, 50_000), True),
        (ServerLoad(0.26, 50_000), False),
        (ServerLoad(5.0, 999), True),
        (ServerLoad(5.0, 1000), False),
    ],
)
def test_room_is_work_that_ends_soon_or_a_chunk_that_is_not_full(load: ServerLoad, room: bool) -> None:
    assert line().has_room(load) is room


def test_nobody_goes_to_a_server_without_room() -> None:
    it = line()
    add(it, "a")
    assert it.next("local", 0.0, [BUSY], [], 0.0) is None
    assert it.next("local", 0.0, [BUSY, FREE], [], 0.0) == "a"
    assert len(it) == 0


def test_those_who_can_be_in_time_go_before_those_who_cannot() -> None:
    it = line(slo_ttft_s=5.0)
    add(it, "long", 0.0, needs_s=20.0)
    add(it, "short", 1.0, needs_s=1.0)
    assert it.next("local", 1.0, [FREE], [], 0.0) == "short"
    assert it.next("local", 1.0, [FREE], [], 0.0) == "long"


def test_nobody_is_held_for_ever() -> None:
    it = line(max_held_s=30.0)
    add(it, "first", 0.0, "prfaas")
    add(it, "second", 1.0)
    assert it.overdue(29.9) == []
    assert it.overdue(30.0) == [("first", "prfaas")]
    assert it.next("prfaas", 30.0, [FREE], [], 0.0) is None
    assert it.overdue(31.0) == [("second", "local")]
    assert len(it) == 0


def test_an_overloaded_line_that_goes_on_lets_nobody_go_before_its_turn() -> None:
    it = line(max_held_s=30.0, slo_ttft_s=1.0)
    for index in range(400):
        add(it, str(index), index * 0.01, needs_s=2.0)
    assert it.next("local", 31.0, [FREE], [], 0.0) == "0"
    assert it.overdue(34.0) == []
    assert len(it.overdue(36.1)) == 399, "no server has taken anybody for 5 s"


def test_who_gives_up_leaves() -> None:
    it = line()
    add(it, "gone")
    add(it, "stays")
    it.remove("gone")
    assert it.keys("local") == ["stays"]
    assert it.next("local", 0.0, [FREE], [], 0.0) == "stays"
    assert it.overdue(1000.0) == []


def test_without_a_promise_the_objective_follows_what_requests_need() -> None:
    it = line(slo_ttft_s=0.0)
    it.observe(0.0, 2.0)
    assert it.objective_s == pytest.approx(4.0)
    for _ in range(30):
        it.observe(1.0, 4.0)
    it.observe(20.0, 4.0)
    assert it.objective_s == pytest.approx(8.0)


def test_a_promise_is_the_objective() -> None:
    it = line(slo_ttft_s=3.0)
    it.observe(0.0, 100.0)
    assert it.objective_s == 3.0


def test_what_waits() -> None:
    it = line()
    add(it, "a", 1.0, needs_s=2.0)
    add(it, "b", 2.0, "prfaas", needs_s=3.0)
    waits = it.waits(4.0)
    assert (waits["local"].requests, waits["local"].work_s, waits["local"].oldest_s) == (1, 2.0, 3.0)
    assert (waits["prfaas"].requests, waits["prfaas"].work_s, waits["prfaas"].oldest_s) == (1, 3.0, 2.0)
    assert it.oldest_s == 1.0
