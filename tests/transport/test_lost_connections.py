"""Connections that break, peers that end or fall silent."""

from __future__ import annotations

import re
import threading
from contextlib import closing

import msgspec
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.transport.messages import Expect, Welcome
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.transfer import State
from tests.transport.fakes import FakeDecode, FakePrefill, at_end, reset
from tests.transport.relay import FaultyRelay
from tests.transport.rig import (
    CONFIG,
    DEADLINE_S,
    ONE_CONNECTION,
    PAGES,
    Pair,
    assert_moved,
    some_slots,
    wait_ended,
    wait_until,
    works,
)


@pytest.mark.parametrize("how", ["reset by prefill", "reset by decode", "closed", "all"])
@pytest.mark.usefixtures("sending")
def test_a_data_connection_that_breaks_costs_nothing(how: str) -> None:
    with Pair() as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES][:10])
        wait_until(lambda: item.transfer.bytes == 10 * 6000, "half of the pages")
        (theirs,) = pair.sender._table.sessions.values()
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
        assert len(pair.sender._table.sessions) == 1


def test_a_control_connection_that_comes_back_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pair() as pair, closing(FaultyRelay(pair.sender.control_port, 0)) as relay:
        pair.sender.control_port = relay.port
        slots = some_slots(1)
        transfer, item = pair.ready(7, slots)
        (theirs,) = pair.sender._table.sessions.values()
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
        assert list(pair.sender._table.sessions.values()) == [theirs]


def test_sessions_lost_many_times_over() -> None:
    """Descriptors are freed and used again; nothing may mistake one connection for another."""
    with Pair() as pair:
        for round_ in range(15):
            slots = some_slots(round_)
            transfer, item = pair.ready(round_, slots)
            pair.send_all(transfer, slots)
            (theirs,) = pair.sender._table.sessions.values()
            pair.sender._control.lose(theirs, "test")
            wait_ended(transfer, item.transfer)
            wait_until(lambda item=item: item.session.failure, "decode noticed")
            pair.sender.release(transfer)
            pair.receiver.release(item)
            works(pair, 100 + round_)


def test_the_process_behind_the_control_port_ends() -> None:
    """Its port refuses: the session ends at once instead of running into a timeout."""
    prefill = FakePrefill()
    with Pair(config=ONE_CONNECTION) as pair, prefill:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.welcome()
        item = pair.receiver.expect(session, 1, some_slots(1), 0)
        prefill.receive(Expect)
        prefill.router.close(linger=0)
        wait_ended(item.transfer)
        assert "its process has ended" in item.transfer.reason


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


def test_a_session_whose_data_connections_never_come() -> None:
    config = msgspec.structs.replace(CONFIG, handshake_timeout_s=0.5)
    with Pair(config=config) as pair, FakeDecode(pair.sender.control_port) as decode:
        decode.hello(pair.layout)
        decode.receive(Welcome)
        wait_until(lambda: not pair.sender._table.sessions, "end of the session")


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
    config = msgspec.structs.replace(ONE_CONNECTION, heartbeat_timeout_s=1.0, reconnect_timeout_s=0.5)
    with FakePrefill() as prefill, Pair(config=config) as pair:
        session = pair.receiver.session("127.0.0.1:1", "127.0.0.1", prefill.control_port)
        prefill.welcome()
        item = pair.receiver.expect(session, 1, some_slots(1), 0)
        wait_ended(item.transfer)
        assert re.search(r"silent for \d+\.\d s$", item.transfer.reason)


def test_heartbeats_keep_an_idle_session() -> None:
    config = msgspec.structs.replace(CONFIG, heartbeat_timeout_s=1.5)
    with Pair(config=config) as pair:
        session = pair.session()
        (theirs,) = pair.sender._table.sessions.values()
        opened_s = theirs.health.heard_s
        wait_until(lambda: theirs.health.heard_s > opened_s + 4.0, "heartbeats for longer than the timeout")
        assert session.up
        assert pair.session() is session
