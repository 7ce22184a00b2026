"""struct tcp_info of kernels old and new, and of a real connection."""

from __future__ import annotations

import socket
import struct
import sys

import pytest

from sglang_prfaas.transport import tcp_info

FULL = (
    struct.pack("=8B", 1, 0, 0, 0, 0, 0, 0, 1)
    + struct.pack("=24I", *range(100, 124))
    + struct.pack("=4Q", 1_000, (1 << 64) - 1, 2_000, 3_000)
    + struct.pack("=6I", 200, 201, 202, 203, 204, 205)
    + struct.pack("=4Q", 4_000, 5_000_000, 6_000_000, 7_000_000)
    + struct.pack("=2I2Q", 300, 301, 8_000, 9_000)
)


def test_every_figure_is_at_its_place() -> None:
    info = tcp_info.parse(FULL + b"what later kernels add")
    assert info == tcp_info.TcpInfo(
        mss_bytes=102,
        unacked_segments=104,
        lost_segments=106,
        cwnd_segments=118,
        retransmitted_segments=123,
        rtt_s=115e-6,
        pacing_bytes_per_s=1_000,
        acked_bytes=2_000,
        notsent_bytes=202,
        min_rtt_s=203e-6,
        sent_segments=205,
        delivery_bytes_per_s=4_000,
        app_limited=True,
        busy_s=5.0,
        rwnd_limited_s=6.0,
        sndbuf_limited_s=7.0,
    )
    assert info.unacked_bytes == 104 * 102


@pytest.mark.parametrize("length", range(0, len(FULL) + 1))
def test_older_kernels_tell_less(length: int) -> None:
    info = tcp_info.parse(FULL[:length])
    if length < 104:
        assert info is None
        return
    assert info is not None
    assert info.rtt_s == 115e-6
    assert info.acked_bytes == (2_000 if length >= 128 else 0)
    assert info.delivery_bytes_per_s == (4_000 if length >= 168 else 0)


def test_values_that_stand_for_none() -> None:
    none = FULL[:148] + struct.pack("=I", 0xFFFFFFFF) + FULL[152:]
    assert tcp_info.parse(none).min_rtt_s == 0.0  # type: ignore[union-attr]
    unlimited = FULL[:104] + struct.pack("=Q", (1 << 64) - 1) + FULL[112:]
    assert tcp_info.parse(unlimited).pacing_bytes_per_s == 0  # type: ignore[union-attr]


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_INFO of Linux")
def test_a_real_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with socket.create_connection(server.getsockname()) as client, server.accept()[0] as accepted:
            client.sendall(bytes(100_000))
            left = 100_000
            while left:
                left -= len(accepted.recv(left))
            accepted.sendall(b"!")
            client.recv(1)
            info = tcp_info.read(client)
            assert info is not None
            assert 0 < info.rtt_s < 1
            assert info.mss_bytes > 500
            assert info.acked_bytes in (100_000, 100_001), "SYN counts on some kernels"
            assert info.sent_segments > 0
        with pytest.raises(OSError):
            tcp_info.read(client)


def test_other_systems_do_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with socket.socket() as sock:
        assert tcp_info.read(sock) is None
