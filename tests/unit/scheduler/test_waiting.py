"""What waits, counted without a look at everybody: the answers are those of a queue that looks at everybody."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_prfaas.core.request import Route
from sglang_prfaas.scheduler.dispatch import ROUTES, Ahead, DispatchQueue
from sglang_prfaas.scheduler.overload import Lateness
from sglang_prfaas.scheduler.waiting import Ordered, Total, Waiting


class PlainQueue(DispatchQueue[int]):
    """Looks at everybody that waits each time."""

    def work_s(self, route: Route) -> float:
        return sum(
            entry.work_s(route) for group in (self._timely, self._late) for entry in group[route].entries.values()
        )

    def ahead(self, route: Route, now_s: float) -> Ahead:
        self._expire(route, now_s)
        entries = list(self._timely[route].entries.values())
        if self.overloaded:
            entries += self._late[route].entries.values()
        link_bytes = sum(entry.link_bytes for entry in entries) if route == "prfaas" else 0.0
        return Ahead(sum(entry.work_s(route) for entry in entries), link_bytes)

    def _expire(self, route: Route, now_s: float) -> None:
        for entry in list(self._timely[route].entries.values()):
            if now_s + entry.work_s(route) > entry.arrived_s + self.ttft_slo_s + 1e-9:
                self._timely[route].pop(entry.key)
                self._late[route].add(entry)
                self._overload.missed(entry.lateness)


eighths = st.integers(0, 160).map(lambda number: number / 8)
"""Seconds that floats hold exactly, so that equal ones are equal."""


class SameAnswers(RuleBasedStateMachine):
    """Both queues through the same life."""

    @initialize(slo_s=st.sampled_from([2.0, 10.0, 30.0]), max_wait_s=st.sampled_from([4.0, 60.0]))
    def begin(self, slo_s: float, max_wait_s: float) -> None:
        self.now_s = 0.0
        self.added = 0
        self.quick: DispatchQueue[int] = DispatchQueue(ttft_slo_s=slo_s, max_wait_s=max_wait_s)
        self.plain = PlainQueue(ttft_slo_s=slo_s, max_wait_s=max_wait_s)

    @rule(
        count=st.integers(1, 40),
        route=st.sampled_from(ROUTES),
        waited_s=eighths,
        local_s=st.one_of(eighths, st.just(float("inf"))),
        prfaas_s=eighths,
        fixed=st.booleans(),
        link_bytes=st.integers(0, 1 << 40),
    )
    def add(
        self, count: int, route: Route, waited_s: float, local_s: float, prfaas_s: float, fixed: bool, link_bytes: int
    ) -> None:
        for _ in range(count):
            for queue in (self.quick, self.plain):
                queue.add(
                    self.added,
                    route,
                    arrived_s=self.now_s - waited_s,
                    local_s=local_s,
                    prfaas_s=prfaas_s,
                    fixed=fixed,
                    link_bytes=float(link_bytes),
                )
            self.added += 1

    @rule(which=st.integers(0, 10_000))
    def remove(self, which: int) -> None:
        key = which % max(1, self.added)
        assert self.quick.remove(key) == self.plain.remove(key)

    @rule(by_s=eighths)
    def wait(self, by_s: float) -> None:
        self.now_s += by_s

    @rule(slo_s=st.integers(1, 240).map(lambda number: number / 8))
    def objective(self, slo_s: float) -> None:
        self.quick.ttft_slo_s = self.plain.ttft_slo_s = slo_s

    @rule(route=st.sampled_from(ROUTES), left_s=st.lists(eighths, max_size=3), other_s=st.lists(eighths, max_size=3))
    def take(self, route: Route, left_s: list[float], other_s: list[float]) -> None:
        taken = [queue.take(route, self.now_s, left_s, other_s) for queue in (self.quick, self.plain)]
        assert taken[0] == taken[1]

    @invariant()
    def same(self) -> None:
        for route in ROUTES:
            assert self.quick.ahead(route, self.now_s) == self.plain.ahead(route, self.now_s)
            assert self.quick.work_s(route) == self.plain.work_s(route)
            assert self.quick.keys(route) == self.plain.keys(route)
        assert self.quick.overloaded == self.plain.overloaded


TestSameAnswers = SameAnswers.TestCase


def entry(number: int, arrived_s: float = 0.0) -> Waiting[int]:
    return Waiting(number, number, arrived_s, 1.0, 1.0, False, 0.0, Lateness(), False)


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30), st.integers(0, 10))
def test_ordered(asked: list[tuple[int, bool]], bound: int) -> None:
    ordered: Ordered[int] = Ordered()
    there: list[tuple[float, Waiting[int]]] = []
    for number, (figure, leaves) in enumerate(asked):
        one = entry(number)
        ordered.add(figure, one)
        there.append((figure, one))
        if leaves:
            _, gone = there.pop(len(there) // 2)
            ordered.remove(gone)
        assert ordered.first() is min(there, key=lambda item: (item[0], item[1].number), default=(0.0, None))[1]
    assert ordered.pop_below(bound) == [one for figure, one in there if figure < bound]
    left = [(figure, one.number) for figure, one in there if figure >= bound]
    first = ordered.first()
    assert (first.number if first is not None else None) == (min(left)[1] if left else None)


@given(st.lists(st.one_of(st.floats(0, 1e6), st.just(float("inf"))), max_size=50))
def test_nothing_is_left_of_what_has_gone(values: list[float]) -> None:
    total = Total()
    for value in values:
        total.add(value)
    assert float(total) == float("inf") if float("inf") in values else abs(float(total) - sum(values)) < 1e-6
    for value in reversed(values):
        total.add(value, -1)
    assert float(total) == 0.0
