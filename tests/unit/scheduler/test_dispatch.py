"""Which waiting request goes next."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.core.request import Route
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.dispatch import DispatchQueue


def queue(**limits: float) -> DispatchQueue[str]:
    return DispatchQueue(**{"ttft_slo_s": 10.0, "max_wait_s": 60.0, "slack": 10.0, **limits})


def add(waiting: DispatchQueue[str], key: str, arrived_s: float, work_s: float, route: Route = "local") -> None:
    waiting.add(key, route, arrived_s=arrived_s, local_s=work_s, prfaas_s=work_s)


def take(waiting: DispatchQueue[str], now_s: float = 0.0, route: Route = "local") -> str | None:
    return waiting.take(route, now_s, [0.0], [0.0])


def test_in_order_of_arrival_while_all_can_make_it() -> None:
    waiting = queue()
    for index, work_s in enumerate((3.0, 1.0, 2.0)):
        add(waiting, str(index), index * 0.1, work_s)
    assert [take(waiting, 0.5) for _ in range(4)] == ["0", "1", "2", None]


def test_the_longest_gives_way_where_not_all_can_make_it() -> None:
    waiting = queue()
    for index, work_s in enumerate((8.0, 3.0, 3.0, 3.0)):
        add(waiting, str(index), 0.0, work_s)
    assert [take(waiting, now_s) for now_s in (0.0, 3.0, 6.0, 9.0)] == ["1", "2", "3", "0"]


def test_of_equal_ones_the_last_gives_way() -> None:
    waiting = queue()
    for index in range(20):
        add(waiting, str(index), 0.0, 3.0)
    assert [take(waiting, now_s) for now_s in (0.0, 3.0, 6.0)] == ["0", "1", "2"]


def test_more_servers_make_more_of_them() -> None:
    waiting = queue()
    for index, work_s in enumerate((8.0, 3.0, 3.0, 3.0)):
        add(waiting, str(index), 0.0, work_s)
    assert waiting.take("local", 0.0, [0.0, 0.0], []) == "0"


def test_late_ones_go_after_the_others_short_ones_first() -> None:
    waiting = queue()
    add(waiting, "late and long", 0.0, 9.0)
    add(waiting, "late", 1.0, 2.0)
    add(waiting, "timely", 15.0, 1.0)
    assert waiting.ahead("local", 15.0).work_s == 1.0
    assert waiting.work_s("local") == 12.0
    assert [take(waiting, 15.0) for _ in range(3)] == ["timely", "late", "late and long"]


def overloaded(waiting: DispatchQueue[str], now_s: float) -> None:
    """A flood of which nearly all are late, and all have left."""
    for index in range(400):
        add(waiting, f"flood {index}", now_s - 50.0, 2.0)
    while take(waiting, now_s) is not None:
        pass
    assert waiting.overloaded


def test_under_an_overload_the_longest_go_last_and_the_others_in_order_of_arrival() -> None:
    waiting = queue()
    overloaded(waiting, 50.0)
    for key, arrived_s, work_s in (("long", 40.0, 8.0), ("late", 41.0, 2.0), ("timely", 59.0, 0.5)):
        add(waiting, key, arrived_s, work_s)
    assert waiting.ahead("local", 60.0).work_s == 10.5, "a new request waits for all of them"
    assert [take(waiting, 60.0) for _ in range(4)] == ["late", "timely", "long", None]


def test_old_ones_have_a_fifth_of_the_time_under_an_overload() -> None:
    waiting = queue()
    overloaded(waiting, 50.0)
    for index in range(3):
        add(waiting, f"old {index}", 0.0, 8.0)
    for index in range(100):
        add(waiting, f"{index}", 60.0, 2.0)
    taken = [take(waiting, 70.0) for _ in range(50)]
    old = [number for number, key in enumerate(taken) if key and key.startswith("old")]
    assert old == [0, 17, 34], "8 s for every 32 s of others"


def test_an_overload_is_over_when_the_recent_ones_are_in_time() -> None:
    waiting = queue()
    overloaded(waiting, 50.0)
    for index in range(271):
        add(waiting, f"{index}", 60.0, 0.1)
    assert not waiting.overloaded
    assert take(waiting, 60.0) == "0"


def test_a_full_link_takes_nobody() -> None:
    waiting = queue()
    waiting.add("far", "prfaas", arrived_s=0.0, local_s=2.0, prfaas_s=1.0, link_bytes=5e8)
    assert waiting.ahead("prfaas", 0.0) == (1.0, 5e8)
    assert waiting.take("prfaas", 0.0, [0.0], [0.0], 3.0) is None
    assert waiting.take("local", 0.0, [0.0], [0.0], 3.0) == "far", "the other path does"
    waiting.add("far", "prfaas", arrived_s=0.0, local_s=2.0, prfaas_s=1.0)
    assert waiting.take("prfaas", 0.0, [0.0], [0.0], 1.0) == "far"


def test_nobody_waits_for_ever() -> None:
    waiting = queue()
    add(waiting, "old", 0.0, 11.0)
    now_s = 0.0
    while True:
        now_s += 1.0
        add(waiting, f"new {now_s}", now_s, 1.0)
        if take(waiting, now_s) == "old":
            break
    assert 60.0 <= now_s <= 61.0


def test_an_idle_path_helps_the_other() -> None:
    waiting = queue()
    waiting.add("short", "prfaas", arrived_s=0.0, local_s=2.0, prfaas_s=1.0)
    waiting.add("long", "prfaas", arrived_s=0.0, local_s=9.0, prfaas_s=3.0)
    assert waiting.take("local", 0.0, [0.0], [0.0] * 8) is None, "PrfaaS does both sooner"
    assert waiting.take("local", 0.0, [0.0], [3.0]) == "short"
    waiting.add("a", "local", arrived_s=0.0, local_s=2.0, prfaas_s=1.0)
    waiting.remove("long")
    waiting.add("b", "local", arrived_s=0.0, local_s=9.0, prfaas_s=3.0)
    assert waiting.take("prfaas", 0.0, [0.0], [0.0]) == "b", "what it speeds up most"
    waiting.add("c", "local", arrived_s=0.0, local_s=9.0, prfaas_s=3.0)
    waiting.remove("a")
    assert waiting.take("prfaas", 0.0, [0.0], [0.0], 60.0) is None, "the link is full for a minute"
    assert waiting.take("prfaas", 0.0, [0.0], [0.0], 1.9) == "c"
    waiting.add("a", "local", arrived_s=0.0, local_s=2.0, prfaas_s=1.0)
    waiting.add("forced", "local", arrived_s=0.0, local_s=9.0, prfaas_s=3.0, fixed=True)
    waiting.remove("a")
    assert waiting.take("prfaas", 0.0, [0.0], [0.0]) is None
    assert waiting.keys("local") == ["forced"]


def test_a_request_that_was_given_up_is_gone() -> None:
    waiting = queue()
    add(waiting, "a", 0.0, 1.0)
    assert waiting.waiting("local") == 1
    assert waiting.remove("a")
    assert not waiting.remove("a")
    assert take(waiting) is None


@pytest.mark.parametrize("limits", [{"ttft_slo_s": 0.0}, {"max_wait_s": 0.0}, {"slack": -1.0}])
def test_impossible_limits(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="prefill order"):
        queue(**limits)


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 12), st.booleans()), max_size=20),
    st.integers(1, 4),
    st.floats(50, 130),
)
def test_everything_is_taken_once(entries: list[tuple[float, float, bool]], servers: int, now_s: float) -> None:
    waiting: DispatchQueue[int] = DispatchQueue(ttft_slo_s=10.0)
    for index, (arrived_s, work_s, far) in enumerate(entries):
        waiting.add(index, "prfaas" if far else "local", arrived_s=arrived_s, local_s=work_s, prfaas_s=work_s / 2)
    taken = []
    while (key := waiting.take("prfaas", now_s, [0.0] * servers, [1.0])) is not None:
        taken.append(key)
    assert sorted(taken) == list(range(len(entries)))
    assert waiting.work_s("local") == waiting.work_s("prfaas") == 0
