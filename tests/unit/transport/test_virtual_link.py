"""The mover's core over a link in memory, under a virtual clock.

PRFAAS_SCENARIOS: how many random ones (default 150); PRFAAS_SCENARIOS_SEED: which.
"""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest

from tests.transport.rig import Slots
from tests.transport.virtual_link import Link, Session

SCENARIOS = int(os.environ.get("PRFAAS_SCENARIOS", "150"))
SEED = int(os.environ.get("PRFAAS_SCENARIOS_SEED", "1"))


def disjoint_slots(number: int) -> list[Slots]:
    """For so many requests at once, at most 3."""
    return [[np.arange(20 * n, 20 * n + 20), np.arange(2 * n, 2 * n + 2), np.arange(n, n + 1)] for n in range(number)]


def session(link: Link, seed: int = 1, requests: int = 3, connections: int = 3) -> Session:
    made = Session(link, seed, connections)
    for room, slots in enumerate(disjoint_slots(requests), 1):
        made.request(room, 0.1 * room, slots)
    return made


def states(made: Session) -> set[str]:
    return {item.transfer.state.value for item in made.placements.values()}


def test_a_good_link_is_filled() -> None:
    made = session(Link(bytes_per_s=1e6, delay_s=0.005), requests=3)
    made.run()
    assert states(made) == {"done"}
    moved = sum(item.transfer.bytes for item in made.placements.values())
    assert moved / 1e6 < made.clock.now_s() < 1.25 * moved / 1e6 + 0.1
    assert made.resets == 0


@pytest.mark.parametrize(
    "rates",
    [{"reset_rate": 0.05}, {"corrupt_rate": 0.05}, {"stall_rate": 0.1}, {"control_loss": 0.5}],
    ids=lambda rates: next(iter(rates)),
)
def test_one_kind_of_fault_costs_no_request(rates: dict[str, Any]) -> None:
    made = session(Link(**rates))
    made.run()
    assert states(made) == {"done"}


@pytest.mark.parametrize("cut_for_s", [0.2, 1.0, 4.0, 8.0])
def test_a_cut_shorter_than_its_timeout_costs_time(cut_for_s: float) -> None:
    made = session(Link(bytes_per_s=1e6, cut_s=(0.25, 0.25 + cut_for_s)))
    made.run()
    assert states(made) == {"done"}
    assert made.clock.now_s() > cut_for_s
    assert made.resets == 3


def test_a_cut_longer_than_its_timeout_fails_with_a_reason() -> None:
    made = session(Link(bytes_per_s=1e6, cut_s=(0.25, 60.0)))
    made.run()
    assert states(made) == {"failed"}
    assert "all data connections were lost" in made.failure


def test_the_same_seed_does_the_same() -> None:
    def trace(seed: int) -> tuple[float, int]:
        made = session(Link(reset_rate=0.05, corrupt_rate=0.05, stall_rate=0.05, control_loss=0.2), seed)
        made.run()
        return made.clock.now_s(), made.resets

    assert trace(5) == trace(5)
    assert trace(5) != trace(6)


def test_random_links() -> None:
    rng = random.Random(SEED)
    ended: dict[str, int] = {}
    for scenario in range(SCENARIOS):
        start_s = rng.uniform(0.0, 0.6)
        link = Link(
            bytes_per_s=10 ** rng.uniform(5.5, 8),
            delay_s=10 ** rng.uniform(-4, -1),
            reset_rate=rng.choice((0.0, 0.02, 0.1)),
            corrupt_rate=rng.choice((0.0, 0.02, 0.1)),
            stall_rate=rng.choice((0.0, 0.05)),
            control_loss=rng.choice((0.0, 0.1, 0.4)),
            cut_s=rng.choice(((0.0, 0.0), (start_s, start_s + rng.uniform(0.05, 14.0)))),
        )
        made = Session(link, rng.randrange(1 << 30), rng.randint(1, 8))
        for room, slots in enumerate(disjoint_slots(rng.randint(1, 3)), 1):
            made.request(room, rng.uniform(0.0, 0.5), slots, rng.choice((0.0, 0.0, 0.0, rng.uniform(0.01, 0.5))))
        try:
            made.run(600.0)
        except Exception as error:
            raise AssertionError(f"scenario {scenario} of seed {SEED}: {link}") from error
        for state in states(made):
            ended[state] = ended.get(state, 0) + 1
    assert ended["done"] > ended.get("failed", 0)
