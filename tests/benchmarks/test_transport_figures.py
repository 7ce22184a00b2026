"""Rows, bars and the delay line's arithmetic, from made-up samples."""

from __future__ import annotations

import struct

import pytest

from benchmarks.transport import figures, plan, report
from benchmarks.transport.compare import Outcome, Sample
from benchmarks.transport.delay_line import FRAME_BYTES, HEADER_BYTES, Direction, wire_bytes
from benchmarks.transport.links import LINKS, Link, here
from benchmarks.transport.movers.base import Arm
from benchmarks.transport.workload import RECEIVE_SEED, SEND_SEED, WORKLOADS, Memory, digest, extents

LOOPBACK = Link("loopback", 0.0, "127.0.0.1", "127.0.0.1", "lo", "cubic", here, here)
VETH = Link("veth-1gbit", 1000.0, "10.0.0.1", "10.0.0.2", "wire", "cubic", here, here)
GB = 10**9
PREFILL_S = 0.125


def outcome(name: str, *wall_s: float, correct: bool = True) -> Outcome:
    samples = [
        Sample(1 + round_, GB, wall, wall - PREFILL_S, 0.1, 0.2, 0.5, correct) for round_, wall in enumerate(wall_s)
    ]
    return Outcome(Arm(name, name.partition("+")[0]), samples, {})


def test_a_row_has_medians_their_spread_and_its_share_of_the_baseline() -> None:
    found = figures.rows_of(
        LOOPBACK, WORKLOADS["hybrid"], [outcome("prfaas", 0.25, 0.5, 0.2), outcome("plain", 0.2, 0.5, 0.25)]
    )
    row = found[0]
    assert (row["mover"], row["workload"], row["link"]) == ("prfaas", "hybrid", "loopback")
    assert (row["gb_per_s"], row["gb_per_s_min"], row["gb_per_s_max"]) == (4.0, 2.0, 5.0)
    assert (row["cpu_s_per_gb"], row["send_cpu_s_per_gb"], row["receive_cpu_s_per_gb"]) == (0.3, 0.1, 0.2)
    assert (row["fraction"], row["fraction_of"]) == (1.0, "plain")  # of 0.8, 1 and 1.25
    assert row["times"] == {"plain": 1.0}
    assert row["verified"] is True
    assert row["exposed_s"] == 0.125
    assert "exposed" not in row, "without a link's limit there is nothing to compare it with"


def test_on_a_limited_link_the_share_is_of_the_link() -> None:
    row = figures.rows_of(VETH, WORKLOADS["hybrid"], [outcome("prfaas", 10.0)])[0]
    assert (row["gb_per_s"], row["fraction"], row["fraction_of"]) == (0.1, 0.8, "link")
    assert (row["exposed_s"], row["exposed"]) == (9.875, round(9.875 / 8, 4))


def test_layers_are_computed_in_the_order_of_a_hybrid_model() -> None:
    workload = WORKLOADS["hybrid-layers"]
    order = workload.order
    assert order[:5] == [(1, 0), (1, 1), (1, 2), (0, 0), (1, 3)]
    assert sorted(order) == [(0, n) for n in range(workload.layers)] + [(1, n) for n in range(workload.states)]


def test_rounds_that_only_one_arm_has_do_not_count() -> None:
    ours, other = outcome("prfaas", 0.5, 0.25), outcome("plain", 1.0)
    assert figures.ratio(ours, other) == 2.0


def test_an_arm_that_failed_or_delivered_other_bytes_is_named() -> None:
    broken = outcome("nixl")
    broken.failure = "no answer"
    wrong = outcome("mooncake", 1.0, 1.0, correct=False)
    assert figures.failures("loopback", "dense", [broken, wrong, outcome("plain", 1.0)]) == [
        "nixl, dense, loopback: no answer",
        "mooncake, dense, loopback: 2 requests arrived with other bytes than were sent",
    ]
    rows = figures.rows_of(LOOPBACK, WORKLOADS["dense"], [broken, wrong])
    assert [(row["mover"], row["verified"]) for row in rows] == [("mooncake", False)]


def test_bars_are_reached_missed_or_not_measured() -> None:
    rows = figures.rows_of(
        LOOPBACK, WORKLOADS["hybrid"], [outcome("prfaas", 0.25), outcome("plain", 0.24), outcome("mooncake", 0.5)]
    )
    found = {bar["bar"]: (bar["figure"], bar["passed"]) for bar in figures.judged(rows)}
    assert found["prfaas, hybrid, loopback: times plain >= 0.9"] == (0.96, True)
    assert found["prfaas, hybrid, loopback: times mooncake >= 4"] == (2.0, False)
    assert found["prfaas, hybrid, loopback: times nixl >= 4"] == (None, None)
    assert found["prfaas, hybrid, loopback: cpu_s_per_gb <= 0.35"] == (0.3, True)


def test_every_bar_can_be_reached_by_the_full_plan() -> None:
    measured = {(name, study.workload, study.link) for study in plan.FULL for name in study.movers}
    for bar in figures.BARS:
        assert (bar.mover, bar.workload, bar.link) in measured
        if bar.of.startswith("times "):
            assert (bar.of.removeprefix("times "), bar.workload, bar.link) in measured


def test_all_planned_arms_links_and_workloads_exist() -> None:
    for study in (*plan.FULL, *plan.QUICK):
        assert study.link in LINKS
        assert study.workload in WORKLOADS
        assert set(study.movers) <= set(plan.ARMS)


def test_the_page_has_a_line_for_every_row_and_names_what_is_absent() -> None:
    rows = figures.rows_of(LOOPBACK, WORKLOADS["small"], [outcome("prfaas", 0.25), outcome("plain", 0.24)])
    page = report.markdown(
        {
            "command": "python -m benchmarks.transport --json OUT",
            "date": "2026-01-31",
            "cpus": 2,
            "load_average": 0.5,
            "versions": {"nixl": "1.5.1"},
            "rows": rows,
            "not_native": "no compiler",
            "absent": [{"what": "iperf3", "reason": "no iperf3 on PATH", "install": "apt install iperf3"}],
            "bars": figures.judged(rows),
        }
    )
    assert "| `prfaas` | 4.000 (4.000 to 4.000) | 0.300 | 0.100 + 0.200 | 0.960 | 0.125 | 4,004 |" in page
    assert "- `iperf3`: no iperf3 on PATH. To have it: apt install iperf3." in page
    assert "| prfaas, small, loopback: gb_per_s >= 2 | 4.000 | yes |" in page
    assert "nixl 1.5.1" in page
    assert "- `prfaas` without native code: no compiler.\n" in page


def packet(length: int, *, kind: int = 0, header_bytes: int = 0, segment_bytes: int = 0) -> bytes:
    return struct.pack("=BBHHHH", 0, kind, header_bytes, segment_bytes, 0, 0) + bytes(length)


def test_a_large_packet_counts_as_the_segments_it_stands_for() -> None:
    assert wire_bytes(packet(1500)) == 1500 + FRAME_BYTES
    three = packet(52 + 3 * 1448, kind=1, header_bytes=52, segment_bytes=1448)
    assert len(three) - HEADER_BYTES < wire_bytes(three) == 3 * (1500 + FRAME_BYTES)


def test_the_delay_line_keeps_its_rate_its_delay_and_its_order() -> None:
    way = Direction(mbps=8.0, delay_s=0.025)  # 1 MB/s
    first, second = packet(1000 - FRAME_BYTES), packet(2000 - FRAME_BYTES)
    way.put(first, 10.0)
    way.put(second, 10.0)
    assert way.wait_s(10.0) == pytest.approx(0.026)
    assert way.due(10.0259) is None
    assert way.due(10.0261) == first
    assert way.due(10.0279) is None
    assert way.due(10.0281) == second
    assert way.wait_s(11.0) is None


def test_the_delay_line_drops_what_its_buffer_cannot_take() -> None:
    way = Direction(mbps=8.0, delay_s=0.025)
    for _ in range(100):
        way.put(packet(1700 - FRAME_BYTES), 0.0)
    assert way.dropped == 100 - 89  # the last that begins within 150 ms does so after 149.6


def test_where_items_lie_is_the_same_by_address_and_by_view() -> None:
    memory = Memory.private(WORKLOADS["quick"], 1)
    offsets, lengths = extents(memory.workload, RECEIVE_SEED)
    for item, offset, length in zip(memory.items(RECEIVE_SEED), offsets, lengths, strict=True):
        assert memory.flat[offset : offset + length].data == item
    assert sorted(offsets)[0] == 0
    assert lengths.sum() == memory.workload.total_bytes


def test_a_swapped_page_changes_the_digest() -> None:
    memory = Memory.private(WORKLOADS["quick"], 1)
    before = digest(memory, SEND_SEED)
    memory.kv[0][[3, 4]] = memory.kv[0][[4, 3]]
    assert digest(memory, SEND_SEED) != before
