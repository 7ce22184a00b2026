"""The conversation benchmark on a trace made by hand."""

from __future__ import annotations

import pytest

from benchmarks.conversation.replay import BLOCK_BYTES, STATE_BLOCKS, UNBOUNDED, Layout, ideal_hit_rate, play
from benchmarks.conversation.two_sites import play_sites
from sglang_prfaas.simulate.workload import Arrival

BLOCKS = 20


def turn(conversation: int, number: int) -> Arrival:
    """One of two turns: the second has all blocks of the first, and as many more."""
    blocks = tuple(1000 * conversation + block for block in range(BLOCKS * (number + 1)))
    return Arrival(400.0 * number + 20.0 * conversation, 512 * len(blocks) + 1, 100, blocks)


TRACE = sorted((turn(c, n) for c in range(8) for n in range(2)), key=lambda arrival: arrival.at_s)


OWN, STORE = Layout(own_gb=UNBOUNDED), Layout(store_gb=UNBOUNDED)


def test_aware_routing_finds_every_first_turn_again() -> None:
    aware, blind = (play(TRACE, 3, OWN, routing) for routing in ("aware", "blind"))
    assert ideal_hit_rate(TRACE) == aware.block_hit_rate == pytest.approx(1 / 3)
    assert blind.block_hit_rate < 0.2
    assert aware.mean_ttft_s < 0.8 * blind.mean_ttft_s


def test_a_small_pool_holds_less_and_a_store_serves_all() -> None:
    one_turn_gb = (BLOCKS + STATE_BLOCKS) * BLOCK_BYTES / 1e9
    small = play(TRACE, 3, Layout(own_gb=one_turn_gb), "aware")
    lent = play(TRACE, 3, Layout(store_gb=one_turn_gb), "aware")
    store = play(TRACE, 3, STORE, "aware")
    assert small.block_hit_rate < store.block_hit_rate == pytest.approx(1 / 3)
    assert small.block_hit_rate <= lent.block_hit_rate
    assert store.store_share == 1


def test_the_end_of_a_prompt_leaves_first() -> None:
    """Half of a turn fits: its beginning, which is a prefix, and not its end, which is of no use alone."""
    half_gb = (BLOCKS / 2 + STATE_BLOCKS) * BLOCK_BYTES / 1e9
    single = [turn(0, 0), turn(0, 1)]
    assert play(single, 1, Layout(own_gb=half_gb), "aware").block_hit_rate > 0


def test_reading_the_store_takes_time() -> None:
    slow = Layout(store_gb=UNBOUNDED, store_gbps=1.0)
    assert play(TRACE, 3, slow, "aware").mean_ttft_s > play(TRACE, 3, STORE, "aware").mean_ttft_s


def test_two_sites_share_what_they_fetch() -> None:
    apart, fetched = (play_sites(TRACE, UNBOUNDED, fetch) for fetch in (False, True))
    assert apart.block_hit_rate <= fetched.block_hit_rate <= ideal_hit_rate(TRACE)
    assert apart.fetched_share == 0
