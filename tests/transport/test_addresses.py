"""Addresses that lead nowhere, fixed ports, and settings that the kernel does not know."""

from __future__ import annotations

import random
import socket
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ConfigError, LocalError
from sglang_prfaas.transport.messages import Hello, Welcome
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.send_mover import SendMover
from tests.transport.fakes import INSTANCE, FakePrefill
from tests.transport.rig import CONFIG, ONE_CONNECTION, Memory, Pair, layout, some_slots, wait_ended, wait_until, works


def two_free_ports() -> int:
    """Outside of the range that systems take ports of outgoing connections from: those would take them again."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(1024, lowest - 1) if lowest > 2048 else random.randrange(61001, 65534)
        try:
            with socket.create_server(("127.0.0.1", port)), socket.create_server(("127.0.0.1", port + 1)):
                return port
        except OSError:
            continue


def test_nobody_listens() -> None:
    config = msgspec.structs.replace(CONFIG, handshake_timeout_s=1.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Pair(config=config) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", port)
        wait_until(lambda: session.failure, "handshake timeout")
        assert session.failure == f"prefill 127.0.0.1:{port}: no session within 1 s"


def test_something_else_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, Pair() as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", other.getsockname()[1])
        sock, _ = other.accept()
        with sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10)
        wait_until(lambda: session.failure, "end of the session")


def test_the_data_port_cannot_be_reached() -> None:
    with FakePrefill() as prefill, Pair(config=ONE_CONNECTION) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.receive(Hello)
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
        prefill.send(Welcome(b"0123456789abcdef", port, INSTANCE))
        wait_until(lambda: session.failure, "end of the session")
        assert f"data port 127.0.0.1:{port} cannot be reached" in session.failure


def test_names_and_addresses_that_do_not_exist() -> None:
    with Pair() as pair:
        for host in ("no-such-host.invalid", "bad host name"):
            session = pair.receiver.session("127.0.0.1:1", host, 7000)
            wait_until(lambda session=session: session.failure, "end of the session")
            assert "cannot be resolved" in session.failure
    with pytest.raises(LocalError, match="cannot be resolved"):
        SendMover(layout(), Memory(layout(), None).rank, CONFIG, MonotonicClock(), host="no-such-host.invalid")


def test_fixed_ports_and_a_clash() -> None:
    port = two_free_ports()
    with Pair(first_port=port) as pair:
        assert (pair.sender.control_port, pair.sender.data_port) == (port, port + 1)
        works(pair, 7)
        for first in (port, port - 1):
            with pytest.raises(LocalError, match=r"port \d+ on 127.0.0.1 cannot be used: .*Set mover_port"):
                SendMover(pair.layout, pair.source.rank, CONFIG, MonotonicClock(), host="127.0.0.1", first_port=first)
    with pytest.raises(LocalError, match="data port 65536"):
        SendMover(layout(), Memory(layout(), None).rank, CONFIG, MonotonicClock(), host="127.0.0.1", first_port=65535)


def test_a_prefill_rank_restarted_on_the_same_ports() -> None:
    port = two_free_ports()
    with Pair(first_port=port) as old:
        session = old.session()
        item = old.receiver.expect(session, 7, some_slots(1), 0)
        old.sender.close()
        wait_ended(item.transfer)
        assert "the prefill server" in item.transfer.reason
        assert "stop" in item.transfer.reason
        restarted = SendMover(old.layout, old.source.rank, CONFIG, MonotonicClock(), host="127.0.0.1", first_port=port)
        restarted.start()
        try:
            old.sender = restarted
            works(old, 8)
        finally:
            restarted.close()


def test_a_congestion_control_that_does_not_exist() -> None:
    config = TransportConfig(congestion_control="nonsense")
    with pytest.raises(ConfigError, match=r"congestion_control: the kernel has no 'nonsense'"):
        Pair(config=config)
    with pytest.raises(ConfigError, match=r"transport\.congestion_control: the kernel has no 'nonsense'"):
        ReceiveMover(layout(), Memory(layout(), None).rank, config, MonotonicClock())
