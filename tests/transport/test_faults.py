"""Aborts, refusals, broken connections, corrupt bytes and peers that do not follow the protocol, in one process."""

from __future__ import annotations

import os
import random
import re
import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ConfigError, LocalError
from sglang_prfaas.transport import send_mover
from sglang_prfaas.transport.framing import Preface, Receipt
from sglang_prfaas.transport.layout import Component
from sglang_prfaas.transport.mailbox import seal
from sglang_prfaas.transport.messages import (
    Abort,
    Done,
    Expect,
    Failed,
    Hello,
    Ping,
    Pong,
    Refuse,
    Unknown,
    Welcome,
    encode,
)
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.session import State
from tests.transport.fakes import INSTANCE, FakeDecode, FakePrefill, at_end, chunk, read_exactly, reset
from tests.transport.relay import FaultyRelay
from tests.transport.rig import (
    CONFIG,
    DEADLINE_S,
    PAGES,
    Memory,
    Pair,
    assert_moved,
    flat,
    layout,
    some_slots,
    wait_ended,
    wait_until,
)

ONE = msgspec.structs.replace(CONFIG, connections=1)


def works(pair: Pair, room: int) -> None:
    """A whole transfer, in a new session where the old one has failed."""
    slots = some_slots(room)
    transfer, item = pair.ready(room, slots)
    pair.send_all(transfer, slots)
    wait_ended(transfer, item.transfer)
    assert (transfer.state, item.transfer.state) == (State.DONE, State.DONE), transfer.reason
    assert_moved(pair.source, slots, pair.target, slots)
    pair.sender.release(transfer)
    pair.receiver.release(item)


# --- aborts -----------------------------------------------------------------------------------------------------------


def test_decode_aborts_in_the_middle() -> None:
    with Pair() as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES][:10])
        wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
        pair.receiver.abort(item, "client gone")
        after = pair.target.copy()
        pair.sender.send(transfer, PAGES, 10, slots[PAGES][10:])
        wait_ended(transfer)
        assert transfer.reason == "decode ended the request: client gone"
        assert item.transfer.reason == "client gone"
        pair.receiver.release(item)
        pair.sender.release(transfer)
        works(pair, 8)  # over the same connections, to other pages as well: only those may have changed
        touched = some_slots(8)
        for component, buffers in enumerate(pair.target.arrays):
            for buffer, was in zip(buffers, after[component], strict=True):
                rest = np.setdiff1d(np.arange(len(buffer)), touched[component])
                np.testing.assert_array_equal(buffer[rest], was[rest])


@pytest.mark.parametrize("released", [False, True])
def test_late_chunks_of_an_ended_request_are_dropped(released: bool) -> None:
    memory = Memory(layout(), None)
    with FakePrefill() as prefill, Pair(config=ONE, receive_memory=memory) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        (data,) = prefill.welcome()
        wait_until(lambda: session.up, "session up")
        one = pair.receiver.expect(session, 1, some_slots(1, (1, 0, 0)), 0)
        two = pair.receiver.expect(session, 2, some_slots(2, (1, 0, 0)), 0)
        data.sendall(chunk(one.transfer.transfer_id, PAGES, 0, 0, b"a" * 1000))
        wait_until(lambda: one.transfer.bytes == 1000, "first chunk")
        if released:
            pair.receiver.release(one)
        else:
            pair.receiver.abort(one, "client gone")
        before = memory.copy()
        data.sendall(chunk(one.transfer.transfer_id, PAGES, 0, 0, b"b" * 1000))
        data.sendall(chunk(one.transfer.transfer_id, PAGES, 1, 0, b"b" * 4096))
        data.sendall(chunk(999, PAGES, 1, 0, b"b" * 4096))
        data.sendall(chunk(two.transfer.transfer_id, PAGES, 0, 0, b"c" * 1000))
        wait_until(lambda: two.transfer.bytes == 1000, "the chunk after the late ones")
        row = some_slots(2, (1, 0, 0))[PAGES]
        before[PAGES][0][row] = ord("c")
        for ours, theirs in zip(flat(memory.arrays), flat(before), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert prefill.receive(Abort).room == 1


def test_prefill_aborts_in_the_middle_and_reuses_its_pages_at_once() -> None:
    with Pair() as pair:
        original = pair.source.copy()
        for room in range(20):
            for buffers, was in zip(pair.source.arrays, original, strict=True):
                for buffer, value in zip(buffers, was, strict=True):
                    buffer[:] = value
            slots = some_slots(room)
            transfer, item = pair.ready(room, slots)
            for array in flat(pair.target.arrays):
                array[:] = 0
            pair.sender.send(transfer, PAGES, 0, slots[PAGES][:19])
            pair.sender.send(transfer, 1, 0, slots[1])
            wait_until(lambda item=item, room=room: item.transfer.bytes > room * 5000, "some bytes")
            pair.sender.abort(transfer, "prefill ran out of memory")
            for array in flat(pair.source.arrays):
                array[:] = 0xEE
            wait_ended(item.transfer)
            assert item.transfer.state is State.FAILED
            assert item.transfer.reason == "prefill gave the request up: prefill ran out of memory"
            with item.transfer.lock:
                got = pair.target.copy()
            for component in (0, 1):
                for buffer, was in zip(got[component], original[component], strict=True):
                    rows, expected = buffer[slots[component]], was[slots[component]]
                    assert ((rows == expected) | (rows == 0)).all(), "a stale byte was written"
            pair.sender.release(transfer)
            pair.receiver.release(item)


def test_abort_before_prefills_own_request() -> None:
    with Pair() as pair:
        item = pair.receiver.expect(pair.session(), 7, some_slots(1), 0)
        wait_until(lambda: pair.sender._rooms.all(), "decode asked")
        pair.receiver.abort(item, "client gone")
        wait_until(lambda: not pair.sender._rooms.all(), "decode ended the room")
        assert pair.sender.transfer(7).reason == "decode ended the request: client gone"


def test_abort_without_an_expectation() -> None:
    with Pair() as pair:
        transfer = pair.sender.transfer(7)
        pair.receiver.abort_room(pair.dial(), 7, "no room for it")
        wait_ended(transfer)
        assert transfer.reason == "decode ended the request: no room for it"


def test_releasing_in_the_middle_tells_the_other_side() -> None:
    with Pair() as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES])
        pair.sender.release(transfer)
        wait_ended(item.transfer)
        assert item.transfer.reason == "prefill gave the request up: the request ended on the prefill side"
        pair.sender.release(transfer)
        works(pair, 7)


@pytest.mark.parametrize("how", ["pages", "unstarted", "too few", "twice"])
def test_whatever_ends_a_request_on_the_prefill_side_is_told(how: str) -> None:
    with Pair() as pair:
        slots = some_slots(1)
        item = pair.receiver.expect(pair.session(), 7, slots, 0)
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        if how == "pages":
            with transfer.lock:
                transfer.start(19)
            pair.sender.release(transfer)
            reason = "prefill would send 19 pages, decode reserved 20"
        elif how == "unstarted":
            pair.sender.send(transfer, PAGES, 0, slots[PAGES])
            reason = "items of component 0 were sent before decode asked for them"
        else:
            with transfer.lock:
                transfer.start(20)
            pair.sender.send(transfer, PAGES, 0, slots[PAGES])
            if how == "twice":
                pair.sender.send(transfer, PAGES, 0, slots[PAGES])
                reason = "items 0 to 20 of component 0 were sent twice"
            else:
                pair.sender.finish(transfer)
                reason = "prefill sent 0 items of component 1, decode reserved 2"
        wait_ended(transfer, item.transfer)
        assert transfer.reason == reason
        assert item.transfer.reason == f"prefill gave the request up: {reason}"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_layout_mismatch_holds_both_values_and_ends_the_request_on_both_sides() -> None:
    with Pair(decode_layout=layout(kv_dtype="fp8_e5m2")) as pair:
        transfer = pair.sender.transfer(7)
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", pair.sender.control_port, room=7)
        wait_until(lambda: session.failure, "refusal")
        assert session.failure.endswith("layout mismatch: KVCache dtype: prefill has float16, decode has fp8_e5m2")
        wait_ended(transfer)
        assert "prefill has float16, decode has fp8_e5m2" in transfer.reason


def test_another_protocol_version() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.send(Hello(99, "pd", "fake", pair.layout, 1, 4096, INSTANCE, 0))
        assert decode.receive(Refuse).reason == "protocol version mismatch: prefill has 2, decode has 99"


def test_too_many_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_prfaas.transport.handshake.MAX_SESSIONS", 1)
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        pair.session()
        decode.hello(pair.layout)
        assert decode.receive(Refuse).reason.startswith("limit reached: this prefill rank serves 1 decode ranks")


def test_components_that_do_not_match() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.open(pair.layout)
        decode.send(Expect(1, 7, (1, 1), 0))
        failed = decode.receive(Failed)
        assert (failed.transfer_id, failed.room) == (1, 7)
        assert failed.reason == "2 components expected by decode, prefill has 3"


def test_too_many_requests_of_one_decode_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_mover, "MAX_SESSION_TRANSFERS", 3)
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.open(pair.layout)
        for room in range(1, 6):
            decode.send(Expect(room, room, (1, 1, 1), 0))
        assert [decode.receive(Failed).room for _ in range(2)] == [4, 5]
        assert len(pair.sender._rooms.all()) == 3
        works(pair, 50)


def test_a_second_decode_rank_cannot_take_or_end_the_request_of_the_first() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        decode.send(Abort(7, "without a session"))
        decode.open(pair.layout)
        decode.send(Expect(1, 7, (20, 2, 1), 0))
        decode.send(Abort(7, "with a session", item.transfer.transfer_id + 1))
        decode.send(Done(item.transfer.transfer_id, 7))
        decode.send(Ping())
        decode.receive(Pong)
        assert transfer.state is State.SENDING
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert transfer.state is State.DONE


def test_a_transfer_id_used_twice_ends_the_session() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        (data,) = decode.open(pair.layout)
        decode.send(Expect(1, 7, (20, 2, 1), 0))
        decode.send(Expect(1, 8, (20, 2, 1), 0))
        assert at_end(data)
        wait_until(lambda: not pair.sender._sessions, "end of the session")
        assert "used transfer id 1 twice" in pair.sender.transfer(7).reason


def test_done_before_everything_was_sent() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.open(pair.layout)
        decode.send(Expect(1, 7, (20, 2, 1), 0))
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        decode.send(Done(1, 7))
        wait_ended(transfer)
        assert transfer.state is State.FAILED
        assert "too early" in decode.receive(Failed).reason


# --- garbage ----------------------------------------------------------------------------------------------------------


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
        with socket.create_connection(("127.0.0.1", pair.sender.data_port), timeout=DEADLINE_S) as sock:
            sock.sendall(first_bytes)
            assert at_end(sock)
        works(pair, 7)


@pytest.mark.parametrize("index", [1, 65535])
def test_more_data_connections_than_announced(index: int) -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.hello(pair.layout)
        welcome = decode.receive(Welcome)
        first = decode.connect(welcome.data_port, Preface(0, welcome.token).pack())
        wait_until(lambda: pair.sender._sessions[b"Dfake"].links, "first connection")
        assert at_end(decode.connect(welcome.data_port, Preface(index, welcome.token).pack()))
        first.setblocking(False)
        with pytest.raises(BlockingIOError):
            first.recv(1)


def test_a_connection_dialled_again_takes_the_place_of_the_old_one() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.hello(pair.layout)
        preface = Preface(0, (welcome := decode.receive(Welcome)).token).pack()
        first = decode.connect(welcome.data_port, preface)
        wait_until(lambda: pair.sender._sessions[b"Dfake"].links, "first connection")
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
        wait_until(lambda: b"Dfake" not in pair.sender._sessions, "end of the session that sent garbage")
        works(pair, 8)


def test_not_even_zeromq_on_the_control_port() -> None:
    with Pair() as pair:
        with socket.create_connection(("127.0.0.1", pair.sender.control_port), timeout=DEADLINE_S) as sock:
            sock.sendall(os.urandom(2000))
            works(pair, 7)
        works(pair, 8)


def test_a_decode_rank_hears_first_why_its_session_ended() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.open(pair.layout)
        (session,) = pair.sender._sessions.values()

        def lose_and_hear() -> None:
            pair.sender._lose(session, "test")
            pair.sender._receive([zmq.Frame(session.identity), zmq.Frame(seal(encode(Ping())))])

        pair.sender._loop.call(lose_and_hear)
        assert decode.receive(Refuse | Unknown) == Refuse("connection to decode pd/fake lost: test")  # type: ignore[arg-type]


def test_messages_without_a_session() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        for message in (Expect(1, 7, (1, 1, 1), 0), Done(1, 7), Ping()):
            decode.send(message)
            decode.receive(Unknown)
        decode.send(Abort(7, "x"))
        decode.send(Ping())
        decode.receive(Unknown)


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
    with FakePrefill() as prefill, Pair(config=ONE) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.receive(Hello)
        prefill.send(garbage)
        wait_until(lambda: session.failure, "end of the session")
        assert "control message refused" in session.failure


# --- data -------------------------------------------------------------------------------------------------------------


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GOOD = b"a" * 1000


@pytest.mark.parametrize(
    ("wire", "reason"),
    [
        (lambda i: chunk(i, PAGES, 0, 1000, GOOD), "ends at byte 2000 of a stream of 1000 bytes"),
        (lambda i: chunk(i, PAGES, 0, (1 << 64) - 1000, GOOD), "of a stream of 1000 bytes"),
        (lambda i: chunk(i, 9, 0, 0, GOOD), "component 9, buffer 0, which do not exist"),
        (lambda i: chunk(i, PAGES, 9, 0, GOOD), "component 0, buffer 9, which do not exist"),
        (lambda i: chunk(i, PAGES, 0, 0, b"a" * 4097), "chunk of 4097 bytes, expected 1 to 4096"),
    ],
)  # fmt: skip
def test_chunks_that_must_not_be_are_never_written(wire: Any, reason: str) -> None:
    memory = Memory(layout(), None)
    with FakePrefill() as prefill, Pair(config=ONE, receive_memory=memory) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        (data,) = prefill.welcome()
        item = pair.receiver.expect(session, 1, some_slots(1, (1, 0, 0)), 0)
        other = pair.receiver.expect(session, 2, some_slots(1, (1, 0, 0)), 0)
        before = memory.copy()
        data.sendall(wire(item.transfer.transfer_id))
        wait_ended(item.transfer, other.transfer)
        for transfer in (item.transfer, other.transfer):
            assert transfer.state is State.FAILED
            with pytest.raises(AssertionError, match=reason):
                raise AssertionError(transfer.reason)
        for ours, theirs in zip(flat(memory.arrays), flat(before), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert at_end(data)
        assert {prefill.receive(Abort).room, prefill.receive(Abort).room} == {1, 2}


@pytest.mark.parametrize("at", [39, 40, 500, 1039])
def test_a_corrupt_chunk_is_asked_for_again(at: int) -> None:
    memory = Memory(layout(), None)
    with FakePrefill() as prefill, Pair(config=ONE, receive_memory=memory) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        (data,) = prefill.welcome()
        slots = some_slots(1, (1, 0, 0))
        item = pair.receiver.expect(session, 1, slots, 0)
        good = chunk(item.transfer.transfer_id, PAGES, 0, 0, GOOD)
        data.sendall(flip(good, at))
        assert read_exactly(data, 32) == Receipt(0, again=True).pack() + Receipt(1).pack()
        assert (item.transfer.bytes, item.transfer.corrupt_chunks) == (0, 1)
        data.sendall(good)
        assert read_exactly(data, 16) == Receipt(2).pack()
        assert item.transfer.bytes == 1000
        np.testing.assert_array_equal(memory.arrays[PAGES][0][slots[PAGES][0]], np.frombuffer(GOOD, np.uint8))
        data.sendall(flip(good, at))
        assert read_exactly(data, 16) == Receipt(3).pack(), "what is in place is not written over"
        np.testing.assert_array_equal(memory.arrays[PAGES][0][slots[PAGES][0]], np.frombuffer(GOOD, np.uint8))


@pytest.mark.parametrize(
    "wire",
    [
        lambda i: flip(chunk(i, PAGES, 0, 0, GOOD), 25),
        lambda i: flip(chunk(i, PAGES, 0, 0, GOOD), 10),
        lambda i: b"GET / HTTP/1.1" + b" " * 40,
        lambda i: chunk(i, PAGES, 0, 0, GOOD)[:700],
    ],
)
def test_a_connection_that_makes_no_sense_is_dialled_again(wire: Any) -> None:
    memory = Memory(layout(), None)
    with FakePrefill() as prefill, Pair(config=ONE, receive_memory=memory) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        (data,) = prefill.welcome()
        slots = some_slots(1, (1, 0, 0))
        item = pair.receiver.expect(session, 1, slots, 0)
        data.sendall(wire(item.transfer.transfer_id))
        if wire(1) == chunk(1, PAGES, 0, 0, GOOD)[:700]:
            data.shutdown(socket.SHUT_WR)
        again = prefill.accept(1)[0]
        assert item.transfer.bytes == 0
        again.sendall(chunk(item.transfer.transfer_id, PAGES, 0, 0, GOOD))
        assert read_exactly(again, 16) == Receipt(1).pack()
        assert item.transfer.bytes == 1000
        assert session.health.reconnects == 1
        np.testing.assert_array_equal(memory.arrays[PAGES][0][slots[PAGES][0]], np.frombuffer(GOOD, np.uint8))


@pytest.mark.parametrize("how", ["reset by prefill", "reset by decode", "closed", "all"])
def test_a_data_connection_that_breaks_costs_nothing(how: str) -> None:
    with Pair() as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES][:10])
        wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
        (theirs,) = pair.sender._sessions.values()
        if how == "closed":
            theirs.links[1].connection.cut()
        elif how == "all":
            for link in list(theirs.links.values()):
                link.connection.cut()
        else:
            reset((theirs.links[1].connection if how == "reset by prefill" else item.session.connections[1]).sock)
        pair.sender.send(transfer, PAGES, 10, slots[PAGES][10:])
        for component in (1, 2):
            pair.sender.send(transfer, component, 0, slots[component])
        pair.sender.finish(transfer)
        wait_ended(transfer, item.transfer)
        assert (transfer.state, item.transfer.state) == (State.DONE, State.DONE), transfer.reason
        assert_moved(pair.source, slots, pair.target, slots)
        wait_until(lambda: len(theirs.links) == 3, "all connections are there again")
        for room in range(20, 26):
            works(pair, room)
        assert len(pair.sender._sessions) == 1


def test_the_process_behind_the_control_port_ends() -> None:
    """Its port refuses: the session ends at once instead of running into a timeout."""
    prefill = FakePrefill()
    with Pair(config=ONE) as pair, prefill:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.welcome()
        item = pair.receiver.expect(session, 1, some_slots(1), 0)
        prefill.receive(Expect)
        prefill.router.close(linger=0)
        wait_ended(item.transfer)
        assert "its process has ended" in item.transfer.reason


def test_sessions_lost_many_times_over() -> None:
    """Descriptors are freed and used again; nothing may mistake one connection for another."""
    with Pair() as pair:
        for round_ in range(15):
            slots = some_slots(round_)
            transfer, item = pair.ready(round_, slots)
            pair.send_all(transfer, slots)
            (theirs,) = pair.sender._sessions.values()
            pair.sender._lose(theirs, "test")
            wait_ended(transfer, item.transfer)
            wait_until(lambda item=item: item.session.failure, "decode noticed")
            pair.sender.release(transfer)
            pair.receiver.release(item)
            works(pair, 100 + round_)


def test_memory_that_cannot_be_written() -> None:
    class Broken:
        item_bytes, slots = 1000, 64

        def gather(self, *_: object) -> None:
            raise ValueError("bad page")

        def views(self, *_: object) -> list[memoryview]:
            return []

        scatter = gather

    with Pair() as pair:
        slots = some_slots(1)
        broken: Any = Broken()
        pair.target.rank.components[PAGES][0] = broken
        transfer, item = pair.ready(7, slots)
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert "a chunk could not be placed: bad page" in item.transfer.reason
    with Pair() as pair:
        pair.source.rank.components[PAGES][0] = broken
        transfer, item = pair.ready(7, slots)
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert transfer.reason == "prefill could not read a chunk: bad page"
        assert item.transfer.reason == f"prefill gave the request up: {transfer.reason}"


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_session_whose_data_connections_never_come() -> None:
    config = msgspec.structs.replace(CONFIG, handshake_timeout_s=0.5)
    with Pair(config=config) as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.hello(pair.layout)
        decode.receive(Welcome)
        wait_until(lambda: not pair.sender._sessions, "end of the session")


def test_a_decode_rank_that_ends_before_it_has_a_data_connection() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.hello(pair.layout)
        decode.receive(Welcome)
        decode.send(Expect(1, 7, (20, 2, 1), 0))
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        decode.dealer.close(linger=0)
        wait_ended(transfer)
        assert transfer.reason.startswith("connection to decode pd/fake lost: its process has ended: it closed its")


def test_a_decode_rank_that_ends_before_it_was_heard() -> None:
    """What it said is read when its connection has ended already."""
    with Pair() as pair:
        busy = threading.Event()
        pair.sender._loop.call(lambda: busy.wait(DEADLINE_S))
        with FakeDecode(pair.sender.control_port) as decode:
            decode.hello(pair.layout)
            decode.send(Expect(1, 7, (20, 2, 1), 0))
            decode.dealer.close(linger=int(DEADLINE_S * 1000))
            decode.context.term()
        busy.set()
        transfer = pair.sender.transfer(7)
        wait_ended(transfer)
        assert transfer.reason.startswith("connection to decode pd/fake lost: its process has ended: it closed its")


def test_a_control_connection_that_comes_back_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair() as pair, closing(FaultyRelay(pair.sender.control_port, 0)) as relay:
        pair.sender.control_port = relay.port
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        (theirs,) = pair.sender._sessions.values()
        seen = []
        for name in ("control_lost", "control_found"):
            known = getattr(theirs.health, name)
            monkeypatch.setattr(theirs.health, name, lambda now_s, n=name, f=known: (seen.append(n), f(now_s)))
        relay.cut(0.0)
        # Its loss may be seen after it stands again.
        wait_until(lambda: seen[-1:] == ["control_found"], "the control connection stands again")
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert transfer.state is State.DONE
        assert list(pair.sender._sessions.values()) == [theirs]


def test_a_silent_decode_rank() -> None:
    config = msgspec.structs.replace(CONFIG, heartbeat_timeout_s=1.0, reconnect_timeout_s=0.5)
    with Pair(config=config) as pair, FakeDecode(pair.sender.control_port) as decode:
        (data,) = decode.open(pair.layout)
        decode.send(Expect(1, 7, (20, 2, 1), 0))
        transfer = pair.sender.transfer(7)
        wait_ended(transfer)
        assert re.search("silent for|came back within", transfer.reason)
        assert at_end(data)


def test_a_silent_prefill_rank() -> None:
    config = msgspec.structs.replace(ONE, heartbeat_timeout_s=1.0, reconnect_timeout_s=0.5)
    with FakePrefill() as prefill, Pair(config=config) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.welcome()
        item = pair.receiver.expect(session, 1, some_slots(1), 0)
        wait_ended(item.transfer)
        assert "silent for 1." in item.transfer.reason


def test_heartbeats_keep_an_idle_session() -> None:
    config = msgspec.structs.replace(CONFIG, heartbeat_timeout_s=1.5)
    with Pair(config=config) as pair:
        session = pair.session()
        (theirs,) = pair.sender._sessions.values()
        opened_s = theirs.health.heard_s
        wait_until(lambda: theirs.health.heard_s > opened_s + 4.0, "heartbeats for longer than the timeout")
        assert session.up
        assert pair.session() is session


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
    with FakePrefill() as prefill, Pair(config=ONE) as pair:
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


# --- ports and closing ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("instance", "reason"), [(b"1" * 16, "its process has restarted"), (INSTANCE, "it has given this session up")]
)
def test_a_session_that_the_prefill_rank_does_not_know(instance: bytes, reason: str) -> None:
    with FakePrefill() as prefill, Pair(config=ONE) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.welcome()
        prefill.receive(Ping)
        prefill.send(Unknown(instance))
        wait_until(lambda: session.failure, "end of the session")
        assert session.failure.endswith(reason)


def test_a_decode_rank_that_has_restarted_fails_its_transfers_at_once() -> None:
    with Pair() as pair:
        transfer, _ = pair.ready(7, some_slots(1))
        again = ReceiveMover(pair.layout, pair.target.rank, CONFIG, MonotonicClock(), site="pd", server="decode-0")
        again.start()
        try:
            pair.session(again)
            wait_ended(transfer)
            assert transfer.reason == "connection to decode pd/decode-0 lost: its process has restarted"
        finally:
            again.close()


@pytest.mark.parametrize("who", ["sender", "receiver", "both"])
def test_closing_while_transfers_run(who: str) -> None:
    with Pair() as pair:
        requests = [(slots, *pair.ready(room, slots)) for room, slots in ((r, some_slots(r)) for r in range(6))]
        threads = [threading.Thread(target=pair.send_all, args=(t, slots, 1)) for slots, t, _ in requests]
        for thread in threads:
            thread.start()
        closers = [
            threading.Thread(target=end.close)
            for name, end in (("sender", pair.sender), ("receiver", pair.receiver))
            if who in (name, "both")
        ]
        for thread in closers:
            thread.start()
        for thread in [*threads, *closers]:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        for _, transfer, item in requests:
            wait_ended(transfer, item.transfer)
            if item.transfer.state is State.FAILED:
                assert item.transfer.reason


def test_closing_while_the_receiver_is_stuck_in_send() -> None:
    of = layout(components=(Component("kv", (1 << 20,)),))
    config = TransportConfig(connections=1, chunk_bytes=1 << 20, socket_buffer_bytes=1 << 16)
    with (
        Pair(of=of, config=config, send_memory=Memory(of, 1, (8,)), receive_memory=Memory(of, None, (8,))) as pair,
        FakeDecode(pair.sender.control_port) as decode,
    ):
        decode.hello(of, 1, 1 << 20)
        welcome = decode.receive(Welcome)
        data = decode.connect(welcome.data_port, Preface(0, welcome.token).pack())
        decode.send(Expect(1, 7, (8,), 0))
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        with transfer.lock:
            transfer.start(8)
        pair.send_all(transfer, [np.arange(8)])
        data.recv(1)
        pair.sender.close()
        assert transfer.reason == "the prefill server stopped"


def test_closing_what_was_never_started() -> None:
    pair = Pair()
    pair.sender.close()
    pair.receiver.close()
    pair.sender.close()


def test_a_congestion_control_that_does_not_exist() -> None:
    config = TransportConfig(congestion_control="nonsense")
    with pytest.raises(ConfigError, match=r"congestion_control: the kernel has no 'nonsense'"):
        Pair(config=config)
    with pytest.raises(ConfigError, match=r"transport\.congestion_control: the kernel has no 'nonsense'"):
        ReceiveMover(layout(), Memory(layout(), None).rank, config, MonotonicClock())
