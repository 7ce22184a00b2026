"""Plans, TTFT, and the paper's figures beside ours."""

from __future__ import annotations

import msgspec
import pytest

from sglang_prfaas.scheduler import paper, planner
from sglang_prfaas.scheduler.solver import solve
from sglang_prfaas.scheduler.throughput import Fleet, Workload
from sglang_prfaas.scheduler.ttft import prefill_only, with_queue_and_transfer

ROWS = [*planner.compare_table6(), *planner.compare_section_2_3(), *planner.compare_table5()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.where} {row.figure}")
def test_figures_of_the_paper(row: planner.Compared) -> None:
    assert row.within, f"paper {row.paper}, ours {row.ours} {row.unit}"


def test_the_difference_can_be_beyond() -> None:
    assert not planner.Compared("", "", 2.0, 2.1, "s", 0.04).within
    assert planner.Compared("", "", 2.0, 2.1, "s", 0.05001).within
    assert not planner.Compared("", "", 0.5, 0.52, "", 0.01, absolute=True).within


def test_without_load_only_the_transfer_is_added(fleet: Fleet, workload: Workload) -> None:
    alone = prefill_only(fleet, workload, 19_400)
    idle = with_queue_and_transfer(fleet, workload, t_tokens=19_400, n_p=3, rate=1e-6)
    state_s = fleet.kv.state_bytes / 12.5e9
    assert idle.queue_mean_s == pytest.approx(0, abs=1e-6)
    assert idle.transfer_mean_s == pytest.approx(state_s, rel=1e-3), "the KV is sent during prefill"
    assert idle.mean_s == pytest.approx(alone.mean_s + 0.496 * state_s, rel=1e-3)


def test_ttft_grows_with_the_rate_and_has_no_end_beyond_capacity(fleet: Fleet, workload: Workload) -> None:
    found = [
        with_queue_and_transfer(fleet, workload, t_tokens=19_400, n_p=3, rate=rate).p90_s for rate in (1.0, 2.0, 3.0)
    ]
    assert found == sorted(found)
    beyond = with_queue_and_transfer(fleet, workload, t_tokens=19_400, n_p=3, rate=4.0)
    assert beyond.p90_s == beyond.mean_s == float("inf")


def test_a_slow_link_shows_in_the_transfer(fleet: Fleet, workload: Workload) -> None:
    slow = msgspec.structs.replace(fleet, egress_gbps=5.0)
    found = with_queue_and_transfer(slow, workload, t_tokens=19_400, n_p=3, rate=1.0, rtt_s=0.1)
    assert found.transfer_mean_s > 1.0


def test_cost(fleet: Fleet, workload: Workload) -> None:
    found = planner.plan(fleet, workload, solve(fleet, workload), load=0.5, prices=planner.Prices(prfaas=2.0, pd=1.0))
    assert found.cost_per_hour == 32 * 2 + 64
    tokens = found.rate * 3600 * (paper.CASE_STUDY_LENGTHS.mean + 1024)
    assert found.cost_per_million_tokens == pytest.approx(128 / tokens * 1e6)
    assert found.egress_gbps == pytest.approx(12.4 / 2, rel=0.01)
