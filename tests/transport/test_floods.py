"""Peers that send or open as much as they can, over real sockets: they lose what they have, the others nothing."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.transport import acceptor, clients, handshake
from sglang_prfaas.transport.acceptor import MAX_SOURCE_PENDING
from sglang_prfaas.transport.clients import MAX_SOURCE_SILENT
from sglang_prfaas.transport.mailbox import seal
from sglang_prfaas.transport.messages import Abort, Ping, Refuse, Unknown, Welcome, encode
from sglang_prfaas.transport.receive_mover import ReceiveMover
from tests.transport.fakes import FakeDecode, at_end
from tests.transport.keyring import Keyring
from tests.transport.rig import CONFIG, DEADLINE_S, Memory, Pair, layout, lines, wait_until, works

SLOW = msgspec.structs.replace(CONFIG, control_messages_per_s=500.0)
OTHER_LOOPBACK = "127.0.0.66"


class Flood(threading.Thread):
    """Sends one message again and again, until `stop`."""

    def __init__(self, decode: FakeDecode, message: bytes) -> None:
        super().__init__(name="flood")
        self._decode, self._message, self._stop_it = decode, message, threading.Event()

    def run(self) -> None:
        self._decode.dealer.setsockopt(zmq.SNDTIMEO, 20)  # the server may stop reading
        while not self._stop_it.is_set():
            with contextlib.suppress(zmq.Again):
                self._decode.dealer.send(self._message)

    def __enter__(self) -> Flood:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_it.set()
        self.join()


@pytest.mark.parametrize(
    "message",
    [
        seal(encode(Ping())),
        seal(encode(Abort(7, "x" * 4000, 0))),
        b"\xff" * 1000,
    ],
    ids=["ping", "abort", "noise"],
)
def test_a_flood_of_control_messages_ends_its_session_only(message: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with Pair(config=SLOW, decode_config=CONFIG) as pair, FakeDecode(pair.sender.control_port) as decode:
        works(pair, 1)
        (established,) = pair.receiver._table.sessions.values()
        decode.open(layout())
        wait_until(lambda: len(pair.sender._table.sessions) == 2, "the other session")
        with Flood(decode, message):
            wait_until(lambda: len(pair.sender._table.sessions) == 1, "its end")
            for room in range(10, 15):
                works(pair, room)
        assert established.up
        if message != b"\xff" * 1000:  # noise ends a session by itself
            assert len(lines(caplog, "session with decode pd/fake ended", "it sent too many messages")) == 1
        assert len(lines(caplog, "it sent too many messages")) <= 1


def test_a_flood_without_a_session(caplog: pytest.LogCaptureFixture) -> None:
    with Pair(config=SLOW, decode_config=CONFIG) as pair, FakeDecode(pair.sender.control_port) as decode:
        works(pair, 1)
        with Flood(decode, seal(encode(Ping()))):
            line = ("control connection from 127.0.0.1 ended", "it sent too many messages, 500 a second are allowed")
            wait_until(lambda: lines(caplog, *line), "the line")
            works(pair, 2)
        assert len(lines(caplog, "it sent too many messages, 500")) == 1


def test_whoever_flooded_may_not_come_back_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "BAN_S", 1.0)
    with Pair(config=SLOW, decode_config=CONFIG) as pair:
        works(pair, 1)
        with FakeDecode(pair.sender.control_port) as decode, Flood(decode, seal(encode(Ping()))):
            wait_until(lambda: next(iter(pair.sender._loop._gates.values()))._clients._banned, "a ban")
        with FakeDecode(pair.sender.control_port, b"Dagain") as decode:
            wait_until(lambda: _hello_answered(decode), "let in once the ban is over")
        works(pair, 2)


def _hello_answered(decode: FakeDecode) -> bool:
    decode.hello(layout())
    return bool(decode.dealer.poll(200)) and decode.receive((Welcome, Refuse, Unknown)) is not None  # type: ignore[arg-type]


@contextlib.contextmanager
def silent(port: int, count: int, source: str = OTHER_LOOPBACK) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    socks: list[socket.socket] = []
    try:
        for _ in range(count):
            socks.append(socket.create_connection(("127.0.0.1", port), DEADLINE_S, (source, 0)))
        yield socks
    finally:
        for sock in socks:
            sock.close()


def closed(socks: list[socket.socket]) -> int:
    count = 0
    for sock in socks:
        sock.settimeout(0.0)
        try:
            while data := sock.recv(4096):  # ZeroMQ's greeting
                assert data
            count += 1
        except BlockingIOError:
            pass
        except ConnectionError:
            count += 1
    return count


@pytest.mark.parametrize("source", [OTHER_LOOPBACK, "127.0.0.1"])
def test_silent_control_connections_are_bounded(source: str, caplog: pytest.LogCaptureFixture) -> None:
    with Pair() as pair:
        works(pair, 1)
        with silent(pair.sender.control_port, 300, source) as socks:
            wait_until(lambda: closed(socks) >= 300 - MAX_SOURCE_SILENT, "the oldest are closed")
            other = ReceiveMover(layout(), Memory(layout(), None).rank, CONFIG, MonotonicClock(), server="other")
            other.start()
            try:
                assert pair.session(other).up
            finally:
                other.close()
            works(pair, 2)
        assert lines(caplog, f"control connection from {source} ended: it has said nothing, nor have")


def test_a_silent_control_connection_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "SILENT_S", 0.5)
    with Pair() as pair, silent(pair.sender.control_port, 1) as (sock,):
        assert at_end(sock)
        works(pair, 1)


@pytest.mark.parametrize("source", [OTHER_LOOPBACK, "127.0.0.1"])
def test_silent_data_connections_are_bounded(source: str, caplog: pytest.LogCaptureFixture) -> None:
    with Pair() as pair, silent(pair.sender.data_port, 300, source) as socks:
        wait_until(lambda: closed(socks) >= 300 - MAX_SOURCE_PENDING, "the oldest are closed")
        works(pair, 1)
        assert closed(socks[-50:]) <= CONFIG.connections
        assert lines(caplog, f"data connection from {source} refused: no preface, and {MAX_SOURCE_PENDING} of its")


def test_many_sources_share_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptor, "MAX_PENDING_CONNECTIONS", 20)
    with Pair() as pair, contextlib.ExitStack() as stack:
        few = stack.enter_context(silent(pair.sender.data_port, 2, "127.0.0.7"))
        many = stack.enter_context(silent(pair.sender.data_port, 40, OTHER_LOOPBACK))
        wait_until(lambda: closed(many) >= 22, "those of the source that has most are closed")
        assert closed(few) == 0
        works(pair, 1)


def test_sessions_of_one_site_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "MAX_PEER_SESSIONS", 1)
    keyring = Keyring(tmp_path / "keys")
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as pair:
        works(pair, 1)
        movers = [
            ReceiveMover(
                layout(), Memory(layout(), None).rank, keyring.config(site), MonotonicClock(), site=site, server="more"
            )
            for site in ("pd", "third")
        ]
        try:
            for mover in movers:
                mover.start()
            refused = pair.dial(movers[0])
            wait_until(lambda: refused.failure, "refusal")
            assert "limit reached: site pd has 1 sessions, 1 are allowed" in refused.failure
            assert pair.session(movers[1]).up
        finally:
            for mover in movers:
                mover.close()
