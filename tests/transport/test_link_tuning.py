"""Sockets of a session are as the link between its two sites says, at both ends."""

from __future__ import annotations

import socket
import struct
import sys
import time
from pathlib import Path

import pytest

from sglang_prfaas.config.schema import LinkConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.data_tcp import SO_MAX_PACING_RATE
from tests.transport.keyring import Keyring
from tests.transport.rig import CONFIG, Pair, some_slots, wait_ended, wait_until, works

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the options of Linux sockets")


def other_congestion_control() -> str:
    """One that is not the system's default."""
    default = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    allowed = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    return next((name for name in allowed if name != default), default)


def congestion_control(sock: socket.socket) -> str:
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def sending(pair: Pair) -> list[socket.socket]:
    """Sockets of the prefill rank, once all stand."""
    session = next(iter(pair.sender._table.sessions.values()))
    wait_until(lambda: len(session.links) == session.hello.connections, "all connections")
    return [link.connection.sock for link in session.links.values()]


@pytest.mark.parametrize("keys", [False, True])
def test_the_prefill_sites_link_counts(tmp_path: Path, keys: bool) -> None:
    name = other_congestion_control()
    links = {
        "pd": LinkConfig(
            to_site="pd",
            capacity_gbps=1.0,
            connections=5,
            socket_buffer_bytes=50_000,
            congestion_control=name,
            pacing_mbps=80.0,
        )
    }
    keyring = Keyring(tmp_path / "keys") if keys else None
    config, decode_config = (keyring.prfaas, keyring.pd) if keyring else (CONFIG, CONFIG)
    with Pair(config=config, decode_config=decode_config, links=links) as pair:
        works(pair, 1)
        socks = sending(pair)
        assert len(socks) == 5
        (session,) = pair.receiver._table.sessions.values()
        assert len(session.connections) == 5
        for sock in socks:
            wait_until(lambda sock=sock: congestion_control(sock) == name, "congestion control")
            wait_until(lambda sock=sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 100_000, "buffer")
            rate = struct.unpack("@L", sock.getsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, 8))[0]
            assert rate == 2_000_000


@pytest.mark.parametrize("keys", [False, True])
def test_the_decode_sites_link_sets_its_end(tmp_path: Path, keys: bool) -> None:
    links = {"prfaas": LinkConfig(to_site="prfaas", capacity_gbps=1.0, connections=2, socket_buffer_bytes=60_000)}
    keyring = Keyring(tmp_path / "keys") if keys else None
    config, decode_config = (keyring.prfaas, keyring.pd) if keyring else (CONFIG, CONFIG)
    with Pair(config=config, decode_config=decode_config, decode_links=links, prefill_site="prfaas") as pair:
        works(pair, 1)
        (session,) = pair.receiver._table.sessions.values()
        buffers = {c.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) for c in session.connections.values()}
        assert buffers == {120_000}
        if keys:  # else it does not know the site before it has said how many connections it will dial
            assert len(session.connections) == 2


def test_other_sites_have_what_transport_says() -> None:
    with Pair(links={"elsewhere": LinkConfig(to_site="elsewhere", capacity_gbps=1.0, connections=7)}) as pair:
        works(pair, 1)
        assert len(sending(pair)) == CONFIG.connections


def test_a_long_link_gets_more_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_prfaas.transport import send_mover
    from sglang_prfaas.transport.link_tuning import KernelBuffers

    monkeypatch.setattr(send_mover, "kernel_buffers", lambda direction: KernelBuffers(1_000_000, 1_000_000))
    with Pair(links={"pd": LinkConfig(to_site="pd", capacity_gbps=1.0, rtt_ms=40.0)}) as pair:
        works(pair, 1)
        assert len(sending(pair)) == 10, "twice 5 MB, of 1 MB each"
        works(pair, 2)


def test_a_congestion_control_that_does_not_exist_is_refused_at_the_start() -> None:
    bad = {"pd": LinkConfig(to_site="pd", capacity_gbps=1.0, congestion_control="nonesuch")}
    with pytest.raises(ConfigError, match=r"links\.pd\.congestion_control: the kernel has no 'nonesuch'"):
        Pair(links=bad)


def test_the_kernel_paces() -> None:
    """Over several windows: the first one may leave at once."""
    slots = some_slots(1, (60, 8, 1))
    with Pair(links={"pd": LinkConfig(to_site="pd", capacity_gbps=1.0, connections=1, pacing_mbps=16.0)}) as pair:
        began_s, sent_bytes = time.monotonic(), 0
        for room in range(8):
            transfer, item = pair.ready(room, slots)
            pair.send_all(transfer, slots)
            wait_ended(transfer, item.transfer)
            assert not transfer.reason
            sent_bytes += transfer.bytes
        least_s = sent_bytes / (16.0e6 / 8)
        assert time.monotonic() - began_s > 0.5 * least_s
