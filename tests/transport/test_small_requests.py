"""Small chunks: sent from the thread that hands them over, their receipts read by who waits for them."""

from __future__ import annotations

import socket
import threading

import msgspec
import numpy as np
import pytest

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.framing import HEADER_BYTES, TRAILER_BYTES, Preface, Receipt, unpack_header
from sglang_prfaas.transport.layout import Component
from sglang_prfaas.transport.messages import Done, Expect, Welcome
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.transfer import State
from tests.transport.fakes import FakeDecode, read_exactly
from tests.transport.rig import (
    CONFIG,
    DEADLINE_S,
    PAGES,
    Memory,
    Pair,
    assert_moved,
    layout,
    some_slots,
    wait_ended,
    wait_until,
)

PAGE_BYTES, COUNT = 16 << 10, 512
PAGED = layout(components=(Component("kv", (PAGE_BYTES,)),))


def send_all_one_by_one(pair: Pair, transfer: OutgoingTransfer, slots: list[np.ndarray], awaited: bool = True) -> None:
    """Each page once decode has the one before."""
    for page in range(len(slots[PAGES])):
        pair.sender.send(transfer, PAGES, page, slots[PAGES][page : page + 1], awaited=awaited)
        assert transfer.wait_acknowledged((page + 1) * 6000, DEADLINE_S)
        assert transfer.live
    for component in (1, 2):
        pair.sender.send(transfer, component, 0, slots[component])
    pair.sender.finish(transfer)


@pytest.mark.parametrize("awaited", [False, True])
def test_one_after_another(awaited: bool) -> None:
    with Pair() as pair:
        ours, theirs = some_slots(1), some_slots(2)
        transfer, item = pair.ready(7, theirs)
        send_all_one_by_one(pair, transfer, ours, awaited)
        wait_ended(transfer, item.transfer)
        assert (transfer.state, item.transfer.state) == (State.DONE, State.DONE), transfer.reason
        assert_moved(pair.source, ours, pair.target, theirs)


def test_nothing_at_all_is_sent_like_anything_else() -> None:
    """Ranks that share the layers of a pass hand over what is theirs, which may be nothing."""
    with Pair() as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        (session,) = pair.sender._table.sessions.values()
        wait_until(lambda: session.dispatch._idle, "an idle connection")
        assert len(pair.sender.send(transfer, PAGES, 0, slots[PAGES][:0])) == 0
        assert len(pair.sender.send(transfer, PAGES, 0, slots[PAGES], buffers=())) == len(slots[PAGES])
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert_moved(pair.source, slots, pair.target, slots)


def test_several_threads_wait_over_one_connection() -> None:
    with Pair(config=msgspec.structs.replace(CONFIG, connections=1)) as pair:
        requests = [(some_slots(room), *pair.ready(room, some_slots(room))) for room in range(6)]
        threads = [threading.Thread(target=send_all_one_by_one, args=(pair, t, slots)) for slots, t, _ in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()
        for _, transfer, item in requests:
            wait_ended(transfer, item.transfer)
            assert transfer.state is State.DONE, transfer.reason


def test_who_waits_hears_of_the_end() -> None:
    with Pair() as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES][:1])
        waits = threading.Thread(target=transfer.wait_acknowledged, args=(1 << 30, DEADLINE_S))
        waits.start()
        pair.receiver.abort(item, "client gone")
        waits.join(DEADLINE_S)
        assert not waits.is_alive()
        assert transfer.reason == "decode ended the request: client gone"


def test_a_peer_that_does_not_read_holds_nobody_up() -> None:
    """The rest of what the caller could not send leaves from the connection's own thread."""
    memory = Memory(PAGED, 1, (COUNT,))
    config = TransportConfig(connections=1, socket_buffer_bytes=1 << 16)
    with (
        Pair(of=PAGED, config=config, send_memory=memory, receive_memory=Memory(PAGED, None, (COUNT,))) as pair,
        FakeDecode(pair.sender.control_port) as decode,
    ):
        decode.hello(PAGED, 1, 1 << 20)
        welcome = decode.receive(Welcome)
        data = socket.socket()
        decode.sockets.append(data)
        data.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        data.settimeout(DEADLINE_S)
        data.connect(("127.0.0.1", welcome.data_port))
        data.sendall(Preface(0, welcome.token).pack())
        decode.send(Expect(1, 7, (COUNT,), 0))
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        with transfer.lock:
            transfer.start(COUNT)
        order = np.random.default_rng(3).permutation(COUNT)
        for page, slot in enumerate(order):
            pair.sender.send(transfer, 0, page, [slot])
        pair.sender.finish(transfer)
        assert not transfer.all_sent, "the socket holds them all: this test shows nothing"
        got = 0
        seen = set()
        while len(seen) < COUNT:
            header = unpack_header(read_exactly(data, HEADER_BYTES))
            payload = read_exactly(data, header.length + TRAILER_BYTES)
            for at in range(0, header.length, PAGE_BYTES):
                page = (header.offset + at) // PAGE_BYTES
                assert payload[at : at + PAGE_BYTES] == memory.arrays[0][0][order[page]].tobytes()
                seen.add(page)
            got += 1
        data.sendall(Receipt(got).pack())
        decode.send(Done(1, 7))
        wait_ended(transfer)
        assert transfer.state is State.DONE, transfer.reason
        wait_until(lambda: transfer.acknowledged_bytes == COUNT * PAGE_BYTES, "the receipts, on the other connection")
