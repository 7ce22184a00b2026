"""What a prefill rank refuses: peers that do not fit, or do not follow the protocol."""

from __future__ import annotations

import numpy as np
import pytest
import zmq

from sglang_prfaas.transport import send_handler
from sglang_prfaas.transport.framing import Receipt
from sglang_prfaas.transport.mailbox import seal
from sglang_prfaas.transport.messages import (
    PROTOCOL_VERSION,
    Abort,
    Done,
    Expect,
    Failed,
    Hello,
    Ping,
    Pong,
    Refuse,
    Unknown,
    encode,
)
from sglang_prfaas.transport.outbox import MAX_ATTEMPTS
from sglang_prfaas.transport.transfer import State
from tests.transport.fakes import INSTANCE, FakeDecode, FakePrefill, at_end, chunk, read_exactly
from tests.transport.rig import ONE_CONNECTION, PAGES, Pair, layout, some_slots, wait_ended, wait_until, works


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
        reason = f"protocol version mismatch: prefill has {PROTOCOL_VERSION}, decode has 99"
        assert decode.receive(Refuse).reason == reason


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
    monkeypatch.setattr(send_handler, "MAX_SESSION_TRANSFERS", 3)
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.open(pair.layout)
        for room in range(1, 6):
            decode.send(Expect(room, room, (1, 1, 1), 0))
        assert [decode.receive(Failed).room for _ in range(2)] == [4, 5]
        assert len(pair.sender._table.transfers()) == 3
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
        wait_until(lambda: not pair.sender._table.sessions, "end of the session")
        assert "used transfer id 1 twice" in pair.sender.transfer(7).reason


def test_a_chunk_that_always_arrives_corrupt_ends_its_request() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        (data,) = decode.open(pair.layout)
        decode.send(Expect(1, 7, (1, 0, 0), 0))
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        with transfer.lock:
            transfer.start(1)
        pair.sender.send(transfer, PAGES, 0, np.array([3]), buffers=[0])
        wire = chunk(1, PAGES, 0, 0, bytes(pair.source.arrays[PAGES][0][3]))
        for attempt in range(MAX_ATTEMPTS):
            assert transfer.state is State.SENDING
            assert read_exactly(data, len(wire)) == wire
            data.sendall(Receipt(attempt, again=True).pack() + Receipt(attempt + 1).pack())
        assert decode.receive(Failed).reason == "a chunk arrived corrupt 16 times"
        assert (transfer.corrupt_chunks, transfer.resent_chunks) == (16, 15)
        works(pair, 8)


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


def test_messages_without_a_session() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        for message in (Expect(1, 7, (1, 1, 1), 0), Done(1, 7), Ping()):
            decode.send(message)
            decode.receive(Unknown)
        decode.send(Abort(7, "x"))
        decode.send(Ping())
        decode.receive(Unknown)


def test_a_decode_rank_hears_first_why_its_session_ended() -> None:
    with Pair() as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.open(pair.layout)
        (session,) = pair.sender._table.sessions.values()

        def lose_and_hear() -> None:
            pair.sender._control.lose(session, "test")
            pair.sender._handler.receive([zmq.Frame(session.identity), zmq.Frame(seal(encode(Ping())))])

        pair.sender._loop.call(lose_and_hear)
        assert decode.receive(Refuse | Unknown) == Refuse("connection to decode pd/fake lost: test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("instance", "reason"), [(b"1" * 16, "its process has restarted"), (INSTANCE, "it has given this session up")]
)
def test_a_session_that_the_prefill_rank_does_not_know(instance: bytes, reason: str) -> None:
    with FakePrefill() as prefill, Pair(config=ONE_CONNECTION) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.welcome()
        prefill.receive(Ping)
        prefill.send(Unknown(instance))
        wait_until(lambda: session.failure, "end of the session")
        assert session.failure.endswith(reason)
