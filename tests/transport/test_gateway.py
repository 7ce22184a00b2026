"""A prefill site that nobody can dial: movers at both ends of a gateway, over real sockets."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ConfigError, LocalError
from sglang_prfaas.transport import gateway as gateway_module
from sglang_prfaas.transport import gateway_ports
from sglang_prfaas.transport.dial_out import DialOut
from sglang_prfaas.transport.gateway import Gateway
from sglang_prfaas.transport.gateway_messages import PREFACE, PREFACE_MAGIC
from sglang_prfaas.transport.security import make
from sglang_prfaas.transport.splice import Splicer
from tests.transport.addresses import HERE, THERE, free_pair
from tests.transport.fakes import at_end, read_exactly
from tests.transport.keyring import Keyring, now
from tests.transport.namespaces import Wire, obstacle, wire
from tests.transport.rig import CONFIG, DEADLINE_S, PAGES, Pair, lines, some_slots, wait_ended, wait_until, works
from tests.transport.test_processes import AT_ONCE_S, BUSY_S, noticed_after_s, peer


@contextlib.contextmanager
def joined(
    ports: list[int],
    config: TransportConfig = CONFIG,
    out: TransportConfig | None = None,
    site: str = "prfaas",
    of: str = "prfaas",
) -> Iterator[tuple[Gateway, DialOut]]:
    """Both ends, once they have found each other. site: what the one that dials says; of: whom the other lets in."""
    gateway = Gateway(THERE, free_pair(THERE), ports, of, config, MonotonicClock())
    targets = dict.fromkeys(ports, HERE)
    dialler = DialOut(
        THERE, gateway.port, targets, site=site, to_site="pd", config=out or config, clock=MonotonicClock()
    )
    try:
        gateway.start()
        dialler.start()
        wait_until(lambda: gateway.reachable, "the site has dialled in")
        yield gateway, dialler
    finally:
        dialler.stop()
        gateway.stop()


def refused(port: int) -> bool:
    """Whether a connection to a port of the gateway is ended by it."""
    try:
        sock = socket.create_connection((THERE, port), DEADLINE_S)
    except ConnectionResetError:
        return True  # at once
    with sock:
        return at_end(sock)


def ports_of(pair: Pair) -> list[int]:
    return [pair.sender.control_port, pair.sender.data_port]


@pytest.mark.parametrize("keys", [False, True])
def test_transfers_through_a_gateway(tmp_path: Path, keys: bool) -> None:
    keyring = Keyring(tmp_path / "keys") if keys else None
    config, decode_config = (keyring.prfaas, keyring.pd) if keyring else (CONFIG, CONFIG)
    with (
        Pair(config=config, decode_config=decode_config) as pair,
        joined(ports_of(pair), decode_config, config) as (gateway, _),
    ):
        pair.host = THERE
        for room in range(5):
            works(pair, room)
        assert len(gateway._splicer) == 1 + CONFIG.connections, "control and data connections go through it"


def test_a_gateway_that_is_started_anew_costs_no_request() -> None:
    with Pair() as pair:
        pair.host = THERE
        slots = some_slots(1)
        with joined(ports_of(pair)):
            transfer, item = pair.ready(1, slots)
            pair.sender.send(transfer, PAGES, 0, slots[PAGES][:5])
            wait_until(lambda: item.transfer.bytes, "some pages")
        with joined(ports_of(pair)):
            pair.sender.send(transfer, PAGES, 5, slots[PAGES][5:])
            for component in range(1, len(slots)):
                pair.sender.send(transfer, component, 0, slots[component])
            pair.sender.finish(transfer)
            wait_ended(transfer, item.transfer)
            assert not transfer.reason, transfer.reason


def test_a_site_that_has_not_dialled_in(caplog: pytest.LogCaptureFixture) -> None:
    port = free_pair(THERE)
    gateway = Gateway(THERE, free_pair(THERE), [port], "prfaas", CONFIG, MonotonicClock())
    try:
        gateway.start()
        assert refused(port)
        wait_until(lambda: lines(caplog, "site prfaas has not dialled in"), "the line")
        with pytest.raises(LocalError, match="the gateway cannot have ports"):
            Gateway(THERE, free_pair(THERE), [port], "prfaas", CONFIG, MonotonicClock())
    finally:
        gateway.stop()


def test_ports_where_nobody_listens_or_that_are_not_offered(caplog: pytest.LogCaptureFixture) -> None:
    unused, other = free_pair(HERE), free_pair(HERE)
    with joined([unused, other]) as (_, dialler):
        del dialler._targets[other]
        for port, why in ((unused, f"port {unused}: Connection refused"), (other, f"port {other} is not offered")):
            assert refused(port)
            wait_until(lambda why=why: lines(caplog, "gateway: site prfaas", why), "the line")


def test_a_port_refuses_while_nothing_listens_there_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_ports, "REFUSE_S", 0.3)
    port = free_pair(HERE)

    def dialled() -> bool:
        with socket.create_connection((THERE, port), DEADLINE_S) as sock:
            return not at_end(sock)

    def refuses() -> bool:
        try:
            dialled()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:
            pass  # once
        return False

    with joined([port]):
        wait_until(refuses, "refusal")
        with socket.create_server((HERE, port)) as listener:

            def answered() -> bool:
                with contextlib.suppress(OSError), socket.create_connection((THERE, port), DEADLINE_S) as sock:
                    listener.settimeout(0.2)
                    with listener.accept()[0] as other:
                        other.sendall(b"x")
                        return sock.recv(1) == b"x"
                return False

            wait_until(answered, "it is there")
        wait_until(refuses, "refusal again")


class TestPeersBehindAGateway:
    """What ends there is known here as soon as without a gateway."""

    @pytest.fixture(params=["off", "keys"])
    def config(self, request: pytest.FixtureRequest, tmp_path: Path) -> TransportConfig:
        """Of one site for both ends."""
        if request.param == "off":
            return CONFIG
        make.make_keys(tmp_path, {"pd": ()}, now=now())
        return msgspec.structs.replace(CONFIG, keys_dir=str(tmp_path / "pd"))

    def test_a_killed_prefill_that_comes_back(self, config: TransportConfig) -> None:
        with contextlib.ExitStack() as stack, Pair(config=config, decode_config=config) as pair:
            with peer("prefill", free_pair(HERE), config.keys_dir) as prefill:
                control, data = (int(port) for port in prefill.line()[1:])
                stack.enter_context(joined([control, data], config, site="pd", of="pd"))
                pair.host, pair.sender.control_port = THERE, control
                item = pair.receiver.expect(pair.session(), 7, some_slots(7), 0)
                prefill.do("half", 7)
                wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
                killed_s = time.monotonic()
                prefill.process.kill()
                wait_ended(item.transfer)
                took_s = time.monotonic() - killed_s
                print(f"killed prefill: {took_s:.2f} s: {item.transfer.reason}")
                assert took_s < AT_ONCE_S + BUSY_S
                assert "its process has ended" in item.transfer.reason
            with peer("prefill", control, config.keys_dir) as again:
                assert [int(port) for port in again.line()[1:]] == [control, data]
                wait_until(lambda: pair.dial().up, "a session with the new process")
                item = pair.receiver.expect(pair.session(), 8, some_slots(8), 0)
                again.do("half", 8)
                again.do("rest", 8)
                wait_ended(item.transfer)
                assert not item.transfer.reason, item.transfer.reason

    def test_a_killed_decode(self, config: TransportConfig) -> None:
        with (
            Pair(config=config, decode_config=config) as pair,
            joined(ports_of(pair), config, site="pd", of="pd"),
            peer("decode", pair.sender.control_port, config.keys_dir, THERE) as decode,
        ):
            transfer = pair.sender.transfer(7)
            decode.do("expect", 7)
            wait_until(lambda: transfer.expected, "decode asked")
            with transfer.lock:
                transfer.start(20)
            pair.sender.send(transfer, PAGES, 0, some_slots(7)[PAGES][:10])
            wait_until(lambda: decode.do("state", 7) == ["receiving", str(10 * 6000)], "half of the pages")
            killed_s = time.monotonic()
            decode.process.kill()
            wait_ended(transfer)
            took_s = time.monotonic() - killed_s
            print(f"killed decode: {took_s:.2f} s: {transfer.reason}")
            assert took_s < AT_ONCE_S + BUSY_S
            assert "its process has ended" in transfer.reason

    def test_a_stopped_prefill(self, caplog: pytest.LogCaptureFixture) -> None:
        config = msgspec.structs.replace(CONFIG, heartbeat_timeout_s=1.5, reconnect_timeout_s=1.0)
        with peer("prefill") as prefill, Pair(config=config, decode_config=config) as pair:
            control, data = (int(port) for port in prefill.line()[1:])
            with joined([control, data], config, site="pd", of="pd"):
                pair.host, pair.sender.control_port = THERE, control
                item = pair.receiver.expect(pair.session(), 7, some_slots(7), 0)
                prefill.do("half", 7)
                wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
                prefill.process.send_signal(signal.SIGSTOP)
                stopped_s = time.monotonic()
                took_s = noticed_after_s(caplog, "is silent; its 3 data connections are made anew")
                print(f"stopped prefill: {took_s:.2f} s")
                assert took_s < 1.5 + AT_ONCE_S + BUSY_S
                wait_ended(item.transfer)
                print(f"given up: {time.monotonic() - stopped_s:.2f} s: {item.transfer.reason}")
                assert re.search("silent for|came back within|come back within", item.transfer.reason)

    def test_a_stopped_decode(self) -> None:
        config = msgspec.structs.replace(CONFIG, heartbeat_timeout_s=1.5, reconnect_timeout_s=1.0)
        with (
            Pair(config=config, decode_config=config) as pair,
            joined(ports_of(pair), config, site="pd", of="pd"),
            peer("decode", pair.sender.control_port, host=THERE) as decode,
        ):
            transfer = pair.sender.transfer(7)
            decode.do("expect", 7)
            wait_until(lambda: transfer.expected, "decode asked")
            decode.process.send_signal(signal.SIGSTOP)
            stopped_s = time.monotonic()
            wait_ended(transfer)
            print(f"stopped decode: {time.monotonic() - stopped_s:.2f} s: {transfer.reason}")
            assert re.search("silent for|came back within", transfer.reason)


def test_a_token_that_nobody_waits_for(caplog: pytest.LogCaptureFixture) -> None:
    with joined([free_pair(HERE)]) as (gateway, _):
        for first in (PREFACE.pack(PREFACE_MAGIC, secrets.token_bytes(16)), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"):
            with socket.create_connection((THERE, gateway.port + 1), DEADLINE_S) as sock:
                sock.sendall(first)
                assert at_end(sock)
        assert lines(caplog, "gateway: connection from 127.0.0.1 refused: nobody waits for it")


def test_connections_without_a_preface_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_module, "MAX_WAITING", 3)
    with Pair() as pair, joined(ports_of(pair)) as (gateway, _), contextlib.ExitStack() as stack:
        socks = [
            stack.enter_context(socket.create_connection((THERE, gateway.port + 1), DEADLINE_S)) for _ in range(10)
        ]
        wait_until(lambda: len(gateway._arriving) <= 3, "the oldest are closed")
        assert all(at_end(sock) for sock in socks[:5])


@pytest.mark.parametrize("case", ["another site", "stranger", "no keys"])
def test_who_may_dial_in(tmp_path: Path, case: str) -> None:
    keyring = Keyring(tmp_path / "keys")
    config = {
        "another site": keyring.config("third"),
        "stranger": Keyring(tmp_path / "strangers").prfaas,
        "no keys": CONFIG,
    }[case]
    gateway = Gateway(THERE, free_pair(THERE), [free_pair(HERE)], "prfaas", keyring.pd, MonotonicClock())
    dialler = DialOut(THERE, gateway.port, {}, site="prfaas", to_site="pd", config=config, clock=MonotonicClock())
    right = DialOut(THERE, gateway.port, {}, site="prfaas", to_site="pd", config=keyring.prfaas, clock=MonotonicClock())
    try:
        gateway.start()
        dialler.start()
        wait_until(lambda: dialler._said or gateway._refusals._told, "refusal")
        assert not gateway.reachable
        right.start()
        wait_until(lambda: gateway.reachable, "the right one gets in")
    finally:
        dialler.stop()
        right.stop()
        gateway.stop()


def test_no_keys_beyond_loopback() -> None:
    with pytest.raises(ConfigError, match="the gateway would listen on"):
        Gateway("0.0.0.0", free_pair(HERE), [], "prfaas", CONFIG, MonotonicClock())


@contextlib.contextmanager
def spliced() -> Iterator[tuple[socket.socket, socket.socket, Splicer]]:
    """Both outer ends of a relayed connection."""
    splicer = Splicer("relay")
    ends, inner = [], []
    for _ in range(2):
        with socket.create_server((HERE, 0)) as listener:
            ends.append(socket.create_connection(listener.getsockname(), DEADLINE_S))
            inner.append(listener.accept()[0])
    try:
        splicer.add(*inner)
        yield ends[0], ends[1], splicer
    finally:
        splicer.stop()
        for sock in ends:
            sock.close()


def test_a_relay_moves_everything_both_ways_and_each_end_on_its_own() -> None:
    with spliced() as (one, other, splicer):
        there, back = os.urandom(5_000_000), os.urandom(1_000_000)

        def send() -> None:
            one.sendall(there)
            one.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        assert read_exactly(other, len(there)) == there
        assert other.recv(1) == b""
        thread.join()
        echo = threading.Thread(target=lambda: (other.sendall(back), other.close()))
        echo.start()
        assert read_exactly(one, len(back)) == back
        assert one.recv(1) == b""
        echo.join()
        wait_until(lambda: not len(splicer), "both are over")


def test_a_reset_goes_through() -> None:
    with spliced() as (one, other, splicer):
        one.sendall(b"x")
        assert other.recv(1) == b"x"
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        other.close()
        with pytest.raises(ConnectionResetError):
            one.recv(1)
        wait_until(lambda: not len(splicer), "the end")


MEASURED_BYTES = 256 << 20


def test_what_a_relay_costs() -> None:
    """Prints; loopback, one connection, from one thread to another, the relay between them or not."""

    def moved_s(one: socket.socket, other: socket.socket) -> tuple[float, float]:
        block, began_s, began_cpu_s = bytes(1 << 20), time.monotonic(), time.process_time()

        def send() -> None:
            for _ in range(MEASURED_BYTES // len(block)):
                one.sendall(block)

        thread = threading.Thread(target=send)
        thread.start()
        buffer, left = bytearray(1 << 20), MEASURED_BYTES
        while left:
            count = other.recv_into(buffer)
            assert count
            left -= count
        thread.join()
        return time.monotonic() - began_s, time.process_time() - began_cpu_s

    figures = []
    for _ in range(3):
        with socket.create_server((HERE, 0)) as listener:
            one = socket.create_connection(listener.getsockname(), DEADLINE_S)
            other = listener.accept()[0]
        with one, other:
            direct_s, direct_cpu_s = moved_s(one, other)
        with spliced() as (one, other, _):
            relayed_s, relayed_cpu_s = moved_s(one, other)
        figures.append((direct_s / relayed_s, (relayed_cpu_s - direct_cpu_s) / MEASURED_BYTES * 1e9, relayed_s))
    for ratio, cpu_s_per_gb, relayed_s in figures:
        rate = MEASURED_BYTES / relayed_s / 1e9
        print(f"relayed: {rate:.2f} GB/s, {ratio:.2f} of direct, {cpu_s_per_gb:.2f} CPU s/GB more")


OBSTACLE = obstacle()


@pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)
def test_between_networks_of_which_one_cannot_be_dialled() -> None:
    """The prefill rank listens on the loopback of its own namespace: nobody in the other one can reach that."""
    config = msgspec.structs.replace(CONFIG, security="off", handshake_timeout_s=1.0)
    with wire(1000.0) as link:
        within = (link.near.call, link.far.call)
        with Pair(config=config, within=within) as pair, contextlib.ExitStack() as stack:
            ports = ports_of(pair)
            unreached = link.far.call(pair.dial)
            wait_until(lambda: unreached.failure, "nobody is there")
            port = link.far.call(lambda: free_pair(Wire.far_host))
            gateway = link.far.call(lambda: Gateway(Wire.far_host, port, ports, "prfaas", config, MonotonicClock()))
            stack.callback(gateway.stop)
            link.far.call(gateway.start)
            dialler = link.near.call(
                lambda: DialOut(
                    Wire.far_host,
                    port,
                    dict.fromkeys(ports, HERE),
                    site="prfaas",
                    to_site="pd",
                    config=config,
                    clock=MonotonicClock(),
                )
            )
            stack.callback(dialler.stop)
            link.near.call(dialler.start)
            wait_until(lambda: gateway.reachable, "the site has dialled in")
            pair.host = Wire.far_host
            link.far.call(lambda: works(pair, 1))
