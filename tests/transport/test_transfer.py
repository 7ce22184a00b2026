"""Whole transfers between a prefill rank and decode ranks."""

from __future__ import annotations

import threading

import msgspec
import numpy as np
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError, PeerGoneError
from sglang_prfaas.transport.layout import Component
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.send_lane import SendLane
from sglang_prfaas.transport.transfer import State
from tests.transport.rig import (
    CONFIG,
    PAGES,
    SLOTS,
    Memory,
    Pair,
    assert_moved,
    layout,
    some_slots,
    wait_ended,
    wait_until,
)


@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("chunk_bytes", [4096, 10_000, 1 << 20])
@pytest.mark.usefixtures("sending")
def test_a_hybrid_request(connections: int, chunk_bytes: int) -> None:
    config = TransportConfig(connections=connections, chunk_bytes=chunk_bytes)
    with Pair(config=config) as pair:
        ours, theirs = some_slots(1), some_slots(2)
        before = pair.target.copy()
        transfer, item = pair.ready(7, theirs)
        pair.send_all(transfer, ours)
        wait_ended(transfer, item.transfer)
        assert (transfer.state, item.transfer.state) == (State.DONE, State.DONE)
        assert_moved(pair.source, ours, pair.target, theirs)
        assert item.transfer.bytes == pair.layout.request_bytes((20, 2, 1)) == transfer.bytes
        assert item.transfer.duplicate_bytes == 0
        for component, buffers in enumerate(pair.target.arrays):
            rest = np.setdiff1d(np.arange(SLOTS[component]), theirs[component])
            for buffer, was in zip(buffers, before[component], strict=True):
                np.testing.assert_array_equal(buffer[rest], was[rest])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_addresses_and_names(host: str) -> None:
    with Pair(host=host) as pair:
        slots = some_slots(3)
        transfer, item = pair.ready(7, slots)
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert_moved(pair.source, slots, pair.target, slots)


@pytest.mark.parametrize(
    ("bound", "dialled"), [("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1"), ("::", "::1"), ("::", "127.0.0.1")]
)
def test_wildcards(bound: str, dialled: str) -> None:
    with Pair(host=bound, config=msgspec.structs.replace(CONFIG, security="off")) as pair:
        pair.host = dialled
        slots = some_slots(3)
        transfer, item = pair.ready(7, slots)
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert_moved(pair.source, slots, pair.target, slots)


def test_a_cached_prefix_and_a_request_without_state() -> None:
    with Pair() as pair:
        slots = some_slots(5, (3, 0, 1))
        session = pair.session()
        item = pair.receiver.expect(session, 7, slots, 272)
        transfer = pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        assert transfer.expected is not None
        assert transfer.expected.cached_prefix_tokens == 272
        with transfer.lock:
            transfer.start(3)
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert_moved(pair.source, slots, pair.target, slots)


def test_nothing_to_send() -> None:
    with Pair() as pair:
        nothing = [np.empty(0, np.int64)] * 3
        item = pair.receiver.expect(pair.session(), 7, nothing, 64)
        assert item.transfer.state is State.DONE
        transfer = pair.sender.transfer(7)
        wait_ended(transfer)
        assert transfer.state is State.DONE


@pytest.mark.parametrize("prefill_first", [True, False])
def test_either_leg_may_come_first(prefill_first: bool) -> None:
    with Pair() as pair:
        slots = some_slots(5)
        early = pair.sender.transfer(7) if prefill_first else None
        item = pair.receiver.expect(pair.dial(), 7, slots, 0)
        if early is None:
            wait_until(lambda: pair.sender._table.transfers(), "decode asked")
        transfer = early or pair.sender.transfer(7)
        wait_until(lambda: transfer.expected, "decode asked")
        with transfer.lock:
            transfer.start(20)
        pair.send_all(transfer, slots)
        wait_ended(transfer, item.transfer)
        assert_moved(pair.source, slots, pair.target, slots)


def test_many_requests_at_once_from_two_decode_ranks() -> None:
    clock = MonotonicClock()
    with Pair() as pair:
        memories = [pair.target, Memory(pair.layout, None)]
        second = ReceiveMover(pair.layout, memories[1].rank, CONFIG, clock, server="decode-1")
        second.start()
        try:
            receivers = [pair.receiver, second]
            sessions = [pair.session(receiver) for receiver in receivers]
            count = 8  # per decode rank; slots of different requests do not overlap
            requests = []
            for i in range(2 * count):
                which, place = i % 2, i // 2
                theirs = [
                    np.arange(place * 8, place * 8 + 5, dtype=np.int64),
                    np.array([place], np.int64),
                    np.array([place], np.int64),
                ]
                item = receivers[which].expect(sessions[which], 100 + i, theirs, 0)
                requests.append((which, item, theirs, some_slots(i, (5, 1, 1)), pair.sender.transfer(100 + i)))
            for *_, transfer in requests:
                wait_until(lambda transfer=transfer: transfer.expected, "decode asked")
                with transfer.lock:
                    transfer.start(5)
            threads = [
                threading.Thread(target=pair.send_all, args=(transfer, ours, 2)) for *_, ours, transfer in requests
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for which, item, theirs, ours, transfer in requests:
                wait_ended(transfer, item.transfer)
                assert (transfer.state, item.transfer.state) == (State.DONE, State.DONE), transfer.reason
                assert_moved(pair.source, ours, memories[which], theirs)
                pair.sender.release(transfer)
                receivers[which].release(item)
            assert pair.sender._table.transfers() == []
            assert sessions[0].incoming == {}
        finally:
            second.close()


class Gate:
    """A buffer whose scatters wait until the gate is open."""

    def __init__(self, inner: object) -> None:
        self.inner = inner
        self.slots, self.item_bytes = inner.slots, inner.item_bytes  # type: ignore[attr-defined]
        self.open = threading.Event()
        self.reached = threading.Event()

    def views(self, *_: object) -> list[memoryview]:
        return []

    def gather(self, *args: object) -> None:
        self.inner.gather(*args)  # type: ignore[attr-defined]

    def scatter(self, *args: object) -> None:
        self.reached.set()
        assert self.open.wait(60.0)
        self.inner.scatter(*args)  # type: ignore[attr-defined]


def test_requests_that_share_a_room() -> None:
    """Samples of one prompt come with one bootstrap room; they are paired as they come, and one may end alone."""
    with Pair() as pair:
        session = pair.session()
        ours = some_slots(1, (4, 1, 1))
        theirs = [[np.arange(4) + 4 * i, np.array([i]), np.array([i])] for i in range(3)]
        items = [pair.receiver.expect(session, 7, slots, 0) for slots in theirs]
        transfers = [pair.sender.transfer(7) for _ in range(3)]
        pair.receiver.abort(items[1], "client gone")
        wait_ended(transfers[1])
        for transfer in (transfers[0], transfers[2]):
            wait_until(lambda transfer=transfer: transfer.expected, "decode asked")
            with transfer.lock:
                transfer.start(4)
            pair.send_all(transfer, ours)
        wait_ended(*transfers, *(item.transfer for item in items))
        assert [item.transfer.state for item in items] == [State.DONE, State.FAILED, State.DONE]
        assert [transfer.state for transfer in transfers] == [State.DONE, State.FAILED, State.DONE]
        for index in (0, 2):
            assert_moved(pair.source, ours, pair.target, theirs[index])
        assert not pair.target.arrays[PAGES][0][theirs[1][PAGES]].any()
        for transfer in transfers:
            pair.sender.release(transfer)
        assert pair.sender._table.transfers() == []


def test_a_slow_receiver_does_not_hold_up_another() -> None:
    of = layout(components=(Component("kv", (1 << 20,)),))
    config = TransportConfig(connections=2, chunk_bytes=1 << 18, socket_buffer_bytes=1 << 16)
    source, slow, quick = Memory(of, 1, (24,)), Memory(of, None, (24,)), Memory(of, None, (24,))
    gate = Gate(slow.rank.components[0][0])
    slow.rank.components[0][0] = gate  # type: ignore[call-overload]
    with Pair(of=of, config=config, send_memory=source, receive_memory=slow) as pair:
        other = ReceiveMover(of, quick.rank, config, MonotonicClock())
        other.start()
        try:
            slots = [np.arange(24)]
            transfer, item = pair.ready(1, slots)
            pair.send_all(transfer, slots)
            assert gate.reached.wait(60.0)
            second = other.expect(pair.session(other), 2, slots, 0)
            transfer2 = pair.sender.transfer(2)
            wait_until(lambda: transfer2.expected, "decode asked")
            with transfer2.lock:
                transfer2.start(24)
            pair.send_all(transfer2, slots)
            wait_ended(transfer2, second.transfer)
            assert_moved(source, slots, quick, slots)
            assert item.transfer.live
            gate.open.set()
            wait_ended(transfer, item.transfer)
            assert_moved(source, slots, slow, slots)
        finally:
            gate.open.set()
            other.close()


def test_a_small_request_passes_a_large_one_in_the_same_session() -> None:
    of = layout(components=(Component("kv", (1 << 18,)),))
    config = TransportConfig(connections=1, chunk_bytes=1 << 18)
    source, target = Memory(of, 1, (64,)), Memory(of, None, (64,))
    gate = Gate(target.rank.components[0][0])
    target.rank.components[0][0] = gate  # type: ignore[call-overload]
    with Pair(of=of, config=config, send_memory=source, receive_memory=target) as pair:
        large_slots, small_slots = [np.arange(62)], [np.arange(62, 64)]
        large, large_item = pair.ready(1, large_slots)
        small, _ = pair.ready(2, small_slots)
        pair.send_all(large, large_slots, step=62)
        pair.send_all(small, small_slots)
        gate.open.set()
        wait_ended(large, small, large_item.transfer)
        assert small.last_byte_s <= large.last_byte_s
        assert_moved(source, large_slots, target, large_slots)
        assert_moved(source, small_slots, target, small_slots)


@pytest.mark.usefixtures("sending")
def test_layer_by_layer_and_an_item_that_moved_meanwhile() -> None:
    with Pair() as pair:
        slots = some_slots(9)
        transfer, item = pair.ready(7, slots)
        pages = slots[PAGES]
        written = threading.Event()
        ahead = pair.sender.send(transfer, PAGES, 0, pages[:12], written.wait, buffers=[1])
        spare = int(np.setdiff1d(np.arange(64), pages)[0])
        for buffer in pair.source.arrays[PAGES]:
            buffer[spare] = buffer[pages[5]]
            buffer[pages[5]] = 0
        with transfer.lock:
            ahead[5] = spare
        pages[5] = spare
        written.set()
        pair.sender.send(transfer, PAGES, 12, pages[12:], buffers=[1])
        pair.sender.send(transfer, PAGES, 0, pages, buffers=[0])
        for component in range(1, len(slots)):
            pair.sender.send(transfer, component, 0, slots[component])
        pair.sender.finish(transfer)
        wait_ended(transfer, item.transfer)
        assert transfer.state is State.DONE, transfer.reason
        assert_moved(pair.source, slots, pair.target, [np.asarray(i) for i in item.indices])


def test_a_rate_limit_holds_for_all_connections_together() -> None:
    of = layout(components=(Component("kv", (1 << 14,)),))
    config = TransportConfig(connections=4, chunk_bytes=1 << 18, rate_limit_mbps=16.0)
    source, target = Memory(of, 1, (64,)), Memory(of, None, (64,))
    with Pair(of=of, config=config, send_memory=source, receive_memory=target) as pair:
        slots = [np.arange(64)]
        transfer, item = pair.ready(1, slots)
        pair.send_all(transfer, slots, step=64)
        wait_ended(transfer, item.transfer)
        assert_moved(source, slots, target, slots)
    last_chunk_bytes = 100_000
    assert transfer.last_byte_s - transfer.first_byte_s > 0.9 * (64 * (1 << 14) - 2 * last_chunk_bytes) / 2e6


def test_ready_is_waited_for_and_its_error_ends_the_request() -> None:
    with Pair() as pair:
        slots = some_slots(5)
        transfer, item = pair.ready(7, slots)
        computed = threading.Event()
        pair.source.arrays[PAGES][0][:] = 0

        def ready() -> None:
            assert computed.wait(60.0)

        pair.sender.send(transfer, PAGES, 0, slots[PAGES], ready)
        pair.source.arrays[PAGES][0][:] = 77
        computed.set()
        for component in (1, 2):
            pair.sender.send(transfer, component, 0, slots[component])
        pair.sender.finish(transfer)
        wait_ended(transfer, item.transfer)
        assert_moved(pair.source, slots, pair.target, slots)

        def broken() -> None:
            raise RuntimeError("device lost")

        transfer, item = pair.ready(8, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES], broken)
        wait_ended(transfer, item.transfer)
        assert transfer.reason == "prefill could not read a chunk: device lost"
        assert item.transfer.reason == f"prefill gave the request up: {transfer.reason}"


def test_an_error_that_nobody_expected_ends_the_session_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bool:
        raise RuntimeError("this cannot be")

    with Pair() as pair:
        slots = some_slots(5)
        transfer, item = pair.ready(7, slots)
        monkeypatch.setattr(SendLane, "push", broken)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES], lambda: None)
        wait_ended(transfer, item.transfer)
        assert (transfer.state, item.transfer.state) == (State.FAILED, State.FAILED)
        assert "a chunk could not be sent: this cannot be" in transfer.reason
        assert item.transfer.reason


def test_wrong_calls() -> None:
    with Pair() as pair:
        session = pair.session()
        with pytest.raises(LocalError, match="2 components given, the layout has 3"):
            pair.receiver.expect(session, 7, some_slots(1)[:2], 0)
        with pytest.raises(LocalError, match="0 to 63 exist"):
            pair.receiver.expect(session, 7, [np.array([64]), np.array([0]), np.array([0])], 0)
        slots = some_slots(1)
        transfer, _ = pair.ready(7, slots)
        with pytest.raises(LocalError, match="0 to 63 exist"):
            pair.sender.send(transfer, PAGES, 0, np.array([-1]))
        pair.receiver.close()
        with pytest.raises(PeerGoneError, match="the decode server stopped"):
            pair.receiver.expect(session, 8, slots, 0)
        assert "stopping" in pair.receiver.session("127.0.0.1:1", "127.0.0.1", 1).failure
