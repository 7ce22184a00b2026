"""The conversation benchmark on a trace made by hand."""

from __future__ import annotations

import pytest

from benchmarks.conversation.__main__ import UNBOUNDED, ideal_hit_rate, play
from sglang_prfaas.simulate.workload import Arrival

BLOCKS = 20


def turn(conversation: int, number: int) -> Arrival:
    """One of two turns: the second has all blocks of the first, and as many more."""
    blocks = tuple(1000 * conversation + block for block in range(BLOCKS * (number + 1)))
    return Arrival(400.0 * number + 20.0 * conversation, 512 * len(blocks) + 1, 100, blocks)


TRACE = sorted((turn(c, n) for c in range(8) for n in range(2)), key=lambda arrival: arrival.at_s)


def test_aware_routing_finds_every_first_turn_again() -> None:
    aware, blind = (play(TRACE, 3, UNBOUNDED, routing) for routing in ("aware", "blind"))
    assert ideal_hit_rate(TRACE) == aware.block_hit_rate == pytest.approx(1 / 3)
    assert blind.block_hit_rate < 0.2
    assert aware.mean_ttft_s < 0.8 * blind.mean_ttft_s


def test_a_small_pool_holds_less_and_a_shared_one_serves_all() -> None:
    small = play(TRACE, 3, BLOCKS, "aware")
    shared = play(TRACE, 3, UNBOUNDED, "shared")
    assert small.block_hit_rate < shared.block_hit_rate == pytest.approx(1 / 3)
