"""What `[[links]]` and the bandwidth-delay product make of `[transport]`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.link_tuning import (
    KernelBuffers,
    LinkTuning,
    check_congestion_control,
    check_links,
    for_link,
    kernel_buffers,
    shortfall,
)

MB = 1_000_000
TRANSPORT = TransportConfig(connections=4, congestion_control="cubic", pacing_mbps=100)
SMALL = KernelBuffers(grown_bytes=2 * MB, set_bytes=MB)
RAISED = KernelBuffers(grown_bytes=2 * MB, set_bytes=64 * MB)


def link(**changes: object) -> LinkConfig:
    return LinkConfig(**{"to_site": "pd", "capacity_gbps": 1.0, **changes})  # type: ignore[arg-type]


def test_without_a_link_all_is_as_in_transport() -> None:
    assert for_link(TRANSPORT, None, SMALL) is TRANSPORT
    assert for_link(TRANSPORT, link(), SMALL) == TRANSPORT


def test_a_link_says_it_otherwise() -> None:
    tuned = for_link(
        TRANSPORT,
        link(connections=9, socket_buffer_bytes=5000, congestion_control="bbr", pacing_mbps=7, rtt_ms=100),
        SMALL,
    )
    assert (tuned.connections, tuned.socket_buffer_bytes) == (9, 5000)
    assert (tuned.congestion_control, tuned.pacing_mbps) == ("bbr", 7)
    assert tuned.chunk_bytes == TRANSPORT.chunk_bytes


@pytest.mark.parametrize(
    ("capacity_gbps", "rtt_ms", "kernel", "connections", "buffer_bytes"),
    [
        # Twice 1 Gbit/s times 10 ms are 2.5 MB: the kernel's own buffers do.
        (1.0, 10.0, SMALL, 4, 0),
        # 25 MB: 6.25 MB each, where the kernel gives 2 by itself.
        (1.0, 100.0, RAISED, 4, 6_250_000),
        # As much, and no more than 2 MB each: 13 connections.
        (1.0, 100.0, SMALL, 13, 0),
        # 500 MB: four with 64 MB each are not enough, eight are.
        (20.0, 100.0, RAISED, 8, 62_500_000),
        (100.0, 200.0, SMALL, 64, 0),
        (1.0, 100.0, KernelBuffers(), 4, 0),
    ],
)
def test_buffers_and_connections_follow_the_bandwidth_delay_product(
    capacity_gbps: float, rtt_ms: float, kernel: KernelBuffers, connections: int, buffer_bytes: int
) -> None:
    tuned = for_link(TRANSPORT, link(capacity_gbps=capacity_gbps, rtt_ms=rtt_ms), kernel)
    assert (tuned.connections, tuned.socket_buffer_bytes) == (connections, buffer_bytes)


def test_what_was_configured_is_not_second_guessed() -> None:
    fixed = TransportConfig(connections=4, socket_buffer_bytes=1000)
    tuned = for_link(fixed, link(connections=2, rtt_ms=100), RAISED)
    assert (tuned.connections, tuned.socket_buffer_bytes) == (2, 1000)


@pytest.mark.parametrize(
    ("entry", "asked", "connections"),
    [
        (None, 2, 2),
        (None, 9, 9),
        # Its entry names a number: that counts.
        (link(connections=3), 9, 3),
        # As many as this end needs, 13 for 25 MB, or more.
        (link(rtt_ms=100.0), 2, 13),
        (link(rtt_ms=100.0), 20, 20),
        (link(rtt_ms=10.0), 2, 2),
    ],
)
def test_the_other_end_asks_for_connections(entry: LinkConfig | None, asked: int, connections: int) -> None:
    tuning = LinkTuning(TRANSPORT, {"pd": entry} if entry else {}, SMALL)
    assert tuning.for_asked("pd", asked).connections == connections
    assert tuning.for_asked("elsewhere", asked).connections == asked


def test_as_many_connections_as_both_ends_agreed_on() -> None:
    tuning = LinkTuning(TRANSPORT, {"pd": link(connections=3, rtt_ms=100.0)}, RAISED)
    assert tuning.for_site("pd").connections == 3
    agreed = tuning.for_agreed("pd", 10)
    assert (agreed.connections, agreed.socket_buffer_bytes) == (10, 2_500_000), "each has its share of 25 MB"
    assert tuning.for_agreed("elsewhere", 10).connections == 10
    assert tuning.for_site("elsewhere") is TRANSPORT


def test_a_link_that_cannot_be_filled_is_told_of() -> None:
    far = link(capacity_gbps=100.0, rtt_ms=200.0)
    why = shortfall(for_link(TRANSPORT, far, SMALL), far, SMALL)
    assert why.startswith("64 connections with buffers of 2000000 bytes carry at most 5.12 of 100 Gbit/s over 200 ms")
    near = link(rtt_ms=10)
    assert shortfall(for_link(TRANSPORT, near, SMALL), near, SMALL) == ""
    assert shortfall(for_link(TRANSPORT, link(), SMALL), link(), SMALL) == ""


def test_what_this_machine_gives(tmp_path: Path) -> None:
    (tmp_path / "ipv4").mkdir()
    (tmp_path / "core").mkdir()
    (tmp_path / "ipv4" / "tcp_wmem").write_text("4096\t16384\t4194304\n")
    (tmp_path / "core" / "wmem_max").write_text("212992\n")
    assert kernel_buffers("send", tmp_path) == KernelBuffers(2097152, 212992)
    assert kernel_buffers("receive", tmp_path) == KernelBuffers()


@pytest.mark.skipif(sys.platform != "linux", reason="congestion control is chosen on Linux only")
def test_congestion_control_that_the_kernel_has_not(caplog: pytest.LogCaptureFixture) -> None:
    check_congestion_control("", "x")
    available = Path("/proc/sys/net/ipv4/tcp_available_congestion_control").read_text().split()
    check_congestion_control(available[0], "x")
    with pytest.raises(ConfigError, match=r"links\.pd\.congestion_control: the kernel has no 'nonesuch'"):
        check_links({"pd": link(congestion_control="nonesuch")}, TransportConfig(), SMALL)
    check_links({"pd": link(capacity_gbps=100.0, rtt_ms=200.0)}, TransportConfig(), SMALL)
    assert "link to pd: 64 connections" in caplog.text
