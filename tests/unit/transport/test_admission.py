"""Admission over a link: the limit, the order, and that ranks which see requests come at different times agree."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.transport.admission import LIMIT_S, SHARED_POOL, Admission, limit_of

MIB = 1 << 20


def test_requests_are_let_in_up_to_the_limit() -> None:
    link: Admission[str] = Admission(100)
    for name, nbytes in (("a", 60), ("b", 30), ("c", 30)):
        link.ask(name, nbytes, 0.0)
        assert link.admits(name)
    link.start("a", 60)
    link.start("b", 30)
    assert (link.inflight_bytes, link.waiting) == (90, 1)
    assert not link.admits("c")
    link.acknowledged("a", 20)
    assert link.admits("c"), "what decode has does not count"
    link.start("c", 30)
    assert link.inflight_bytes == 100
    for name in "abc":
        link.end(name)
        link.end(name)
    assert (link.inflight_bytes, link.waiting) == (0, 0)


def test_no_limit_lets_everything_in() -> None:
    link: Admission[int] = Admission()
    for i in range(10):
        link.ask(i, 1 << 40, 0.0)
        link.start(i, 1 << 40)
        assert link.admits(i)


def test_one_larger_than_the_limit_goes_alone() -> None:
    link: Admission[str] = Admission(100)
    link.ask("small", 10, 0.0)
    link.start("small", 10)
    link.ask("large", 1000, 0.0)
    assert not link.admits("large")
    link.end("small")
    assert link.admits("large")
    link.start("large", 1000)
    link.ask("next", 1, 0.0)
    assert not link.admits("next")
    assert not link.admits("never asked for")


def test_small_ones_go_first_but_not_for_ever() -> None:
    link: Admission[str] = Admission(2000 * MIB)
    link.ask("running", 1500 * MIB, 0.0)
    link.start("running", 1500 * MIB)
    link.ask("large", 1000 * MIB, 0.0)
    link.ask("small", 10 * MIB, 0.1)
    assert link.admits("small")
    assert not link.admits("large")
    link.ask("late", 10 * MIB, 10.0)
    assert not link.admits("late"), "it would hold up one that has waited for longer than its size is worth"
    link.end("small")
    link.end("running")
    assert link.admits("large")


def test_the_reason_says_what_is_full() -> None:
    link: Admission[str] = Admission(100, timeout_s=7)
    link.start("a", 60)
    assert link.refusal() == (
        "the link is full: not let in for 7 s, 60 bytes of KVCache are on their way, at most 100 may be"
    )


@pytest.mark.parametrize(
    ("configured", "capacity", "pool", "links", "expected"),
    [
        (123, 1e9, 1, 2, 123),
        (0, 0.0, 0, 1, 0),
        (0, 0.0, 1000, 1, 0),
        (0, 1e6, 0, 1, int(1e6 * (LIMIT_S + 0.05))),
        (0, 1e6, 1000, 2, int(SHARED_POOL * 1000)),
        (0, 0.0, 1000, 3, int(SHARED_POOL * 1000)),
    ],
)
def test_the_limit_is_configured_or_derived(
    configured: int, capacity: float, pool: int, links: int, expected: int
) -> None:
    assert limit_of(configured, capacity, 0.05, pool, links) == expected


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=25),
    seed=st.integers(0, 1 << 30),
    ranks=st.integers(1, 4),
)
def test_ranks_never_wait_for_one_another(sizes: list[int], seed: int, ranks: int) -> None:
    """A request starts once all ranks admit it. Each sees it come up to 0.4 s apart; all must get through."""
    rng = random.Random(seed)
    links: list[Admission[int]] = [Admission(1000 * MIB) for _ in range(ranks)]
    for key, size in enumerate(sizes):
        at_s = rng.uniform(0.0, 20.0)
        for link in links:
            link.ask(key, size * MIB, at_s + rng.uniform(0.0, 0.4))
    waiting = set(range(len(sizes)))
    running: list[int] = []
    while waiting or running:
        let_in = [key for key in waiting if all(link.admits(key) for link in links)]
        if let_in and (not running or rng.random() < 0.7):
            key = rng.choice(let_in)
            waiting.remove(key)
            running.append(key)
            for link in links:
                link.start(key, sizes[key] * MIB)
                assert link.inflight_bytes <= max(1000, sizes[key]) * MIB
            continue
        assert running, "nothing runs, and nobody is let in"
        key = running.pop(rng.randrange(len(running)))
        for link in links:
            link.end(key)
    assert all(link.inflight_bytes == 0 for link in links)
