"""The live threshold."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.lengths import nodes
from sglang_prfaas.scheduler.threshold import (
    NOTHING_OFFLOADED,
    LiveState,
    PathLoad,
    ThresholdController,
    balanced_threshold,
)

LOCAL, PRFAAS, KV = paper.PAPER_PROFILE.prefill["H20"], paper.PAPER_PROFILE.prefill["H200"], paper.PAPER_PROFILE.kv


def state(
    now_s: float = 0.0,
    *,
    far: float = 4,
    near: float = 3,
    far_wait_s: float = 0.0,
    near_wait_s: float = 0.0,
    gbps: float = 100.0,
    backlog: float = 0.0,
) -> LiveState:
    return LiveState(
        now_s=now_s,
        prfaas=PathLoad(servers=far, wait_s=far_wait_s),
        local=PathLoad(servers=near, wait_s=near_wait_s),
        link_gbps=gbps,
        link_backlog_bytes=backlog,
    )


def controller(rate: float = 3.2) -> ThresholdController:
    """Has seen 500 requests of the case study at a rate, the last one at 0 s."""
    made = ThresholdController(local=LOCAL.time_s, prfaas=PRFAAS.time_s, kv=KV, start_t_tokens=19_400)
    lengths = np.random.default_rng(1).permutation(nodes(paper.CASE_STUDY_LENGTHS, 500))
    for index, length in enumerate(lengths):
        made.observe((index - 500) / rate, int(length), int(length))
    return made


def test_eq_7_over_a_sample() -> None:
    lengths = nodes(paper.CASE_STUDY_LENGTHS, 4000)
    t, busy_s = balanced_threshold(
        lengths, LOCAL.time_s.over(lengths), PRFAAS.time_s.over(lengths), KV.sizes_bytes(lengths), state()
    )
    assert t == pytest.approx(19_400, rel=0.02)
    assert 1 / busy_s == pytest.approx(3.2, rel=0.01), (
        "below 3.247: the mean of a convex curve is above that of the mean"
    )


def test_at_full_load_t_is_the_balanced_one() -> None:
    choice = controller(rate=3.3).choose(state())
    assert choice.utilisation == 1.0
    assert choice.t_tokens == pytest.approx(choice.t_balanced, rel=0.03)


def test_without_load_whatever_is_faster_wins() -> None:
    made = ThresholdController(local=LOCAL.time_s, prfaas=PRFAAS.time_s, kv=KV, start_t_tokens=19_400)
    assert made.choose(state()).t_tokens < 1000, "an H200 is always faster here, but for the transfer of the state"


def test_queues_move_t() -> None:
    even = controller().choose(state()).t_tokens
    assert controller().choose(state(far_wait_s=1.0)).t_tokens > even * 1.2
    assert controller().choose(state(near_wait_s=0.3)).t_tokens < even / 1.2


def test_a_link_that_drops_moves_t_at_once() -> None:
    made = controller()
    before = made.choose(state(0.0)).t_tokens
    after = made.choose(state(0.2, gbps=5.0))
    assert after.t_tokens > 1.5 * before
    assert after.t_balanced > 1.5 * before, "eq. 3: egress binds"
    assert made.choose(state(0.4, backlog=25e9)).t_tokens > before, "two seconds of backlog"
    assert made.choose(state(0.6, gbps=0.0)).t_tokens == NOTHING_OFFLOADED
    assert made.choose(state(0.8)).t_tokens == pytest.approx(before, rel=0.03)


def test_dead_servers_move_t_at_once() -> None:
    made = controller()
    before = made.choose(state(0.0)).t_tokens
    assert made.choose(state(0.1, far=2)).t_tokens > before
    gone = made.choose(state(0.2, far=0, far_wait_s=float("inf")))
    assert (gone.t_tokens, gone.reason) == (NOTHING_OFFLOADED, "no PrfaaS server is alive")
    assert made.choose(state(0.3, near=0, near_wait_s=float("inf"))).t_tokens == 0


def test_a_prefix_that_only_pd_holds_counts_against_offloading() -> None:
    made = controller()
    plain = made.choose(state(), 20_000, 20_000).t_tokens
    assert controller().choose(state(), 20_000, 60_000).t_tokens > 2 * plain


def test_small_changes_are_ignored() -> None:
    made = controller()
    before = made.choose(state())
    after = made.choose(state(far_wait_s=0.005))
    assert after.t_tokens == before.t_tokens
    assert after.reason.endswith("kept")
