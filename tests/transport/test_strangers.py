"""Connections and bytes that do not belong, on the control and the data port."""

from __future__ import annotations

import os
import socket
import threading

import msgspec
import pytest
import zmq

from sglang_prfaas.transport.framing import Preface, Receipt
from sglang_prfaas.transport.mailbox import seal
from sglang_prfaas.transport.messages import Hello, Ping, Pong, Refuse, Welcome
from tests.transport.fakes import FakeDecode, FakePrefill, at_end
from tests.transport.rig import CONFIG, DEADLINE_S, ONE_CONNECTION, Pair, wait_until, works


@pytest.mark.parametrize(
    "first_bytes",
    [
        Preface(0, b"wrong token 1234").pack(),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x00" * 24,
        b"PFD1\x00\x63" + b"\x00" * 18,
        b"PFD",
    ],
)
def test_data_connections_that_do_not_belong(first_bytes: bytes) -> None:
    config = msgspec.structs.replace(CONFIG, handshake_timeout_s=2.0)
    with Pair(config=config) as pair:
        pair.session()
        (theirs,) = pair.sender._table.sessions.values()
        wait_until(lambda: len(theirs.links) == config.connections, "all connections")
        before = dict(theirs.links)
        with socket.create_connection(("127.0.0.1", pair.sender.data_port), timeout=DEADLINE_S) as sock:
            sock.sendall(first_bytes)
            assert at_end(sock)
        works(pair, 7)
        assert theirs.links == before, "a stranger took the place of a connection"
        assert theirs.health.reconnects == 0


@pytest.mark.parametrize("index", [1, 65535])
def test_more_data_connections_than_announced(index: int) -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.hello(pair.layout)
        welcome = decode.receive(Welcome)
        first = decode.connect(welcome.data_port, Preface(0, welcome.token).pack())
        wait_until(lambda: pair.sender._table.sessions[b"Dfake"].links, "first connection")
        assert at_end(decode.connect(welcome.data_port, Preface(index, welcome.token).pack()))
        first.setblocking(False)
        with pytest.raises(BlockingIOError):
            first.recv(1)


def test_a_connection_dialled_again_takes_the_place_of_the_old_one() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.hello(pair.layout)
        preface = Preface(0, (welcome := decode.receive(Welcome)).token).pack()
        first = decode.connect(welcome.data_port, preface)
        wait_until(lambda: pair.sender._table.sessions[b"Dfake"].links, "first connection")
        second = decode.connect(welcome.data_port, preface)
        assert at_end(first)
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.recv(1)


def test_silent_data_connections_do_not_keep_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_prfaas.transport.acceptor.MAX_PENDING_CONNECTIONS", 4)
    with Pair() as pair:
        silent = [socket.create_connection(("127.0.0.1", pair.sender.data_port)) for _ in range(10)]
        try:
            works(pair, 7)
        finally:
            for sock in silent:
                sock.close()


@pytest.mark.parametrize("again", [False, True])
def test_receipts_of_chunks_that_were_never_sent_end_the_session(again: bool) -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        (data,) = decode.open(pair.layout)
        data.sendall(Receipt(7, again).pack())
        assert at_end(data)
        assert "were sent" in decode.receive(Refuse).reason or not again


def test_bytes_that_are_no_receipts_end_their_connection_only() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        first, second = decode.open(pair.layout, 2)
        first.sendall(b"x" * 16)
        assert at_end(first)
        decode.send(Ping())
        decode.receive(Pong)
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.recv(1)


@pytest.mark.parametrize(
    "garbage", [b"", b"\x00", b"GET / HTTP/1.1", os.urandom(300), b"\x93\xa5Abort\x01\xa2\xff\xfe"]
)
def test_garbage_on_the_control_port(garbage: bytes) -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.send(garbage)
        assert "refused" in decode.receive(Refuse).reason
        decode.dealer.send_multipart([b"one", b"too many"])
        works(pair, 7)
        decode.open(pair.layout)
        decode.send(garbage)
        decode.receive(Refuse)
        wait_until(lambda: b"Dfake" not in pair.sender._table.sessions, "end of the session that sent garbage")
        works(pair, 8)


def test_not_even_zeromq_on_the_control_port() -> None:
    with Pair() as pair:
        with socket.create_connection(("127.0.0.1", pair.sender.control_port), timeout=DEADLINE_S) as sock:
            sock.sendall(os.urandom(2000))
            works(pair, 7)
        works(pair, 8)


def test_a_flood_of_control_messages_leaves_time_for_others() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                try:
                    decode.dealer.send(seal(b"\x91\xa4Ping"), zmq.NOBLOCK)
                    decode.dealer.recv(zmq.NOBLOCK)
                except zmq.Again:
                    pass

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            works(pair, 7)
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("garbage", [b"\x00", b"\x91\xa5Hello", os.urandom(100)])
def test_garbage_from_the_prefill_side(garbage: bytes) -> None:
    with FakePrefill() as prefill, Pair(config=ONE_CONNECTION) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.receive(Hello)
        prefill.send(garbage)
        wait_until(lambda: session.failure, "end of the session")
        assert "control message refused" in session.failure
