"""Whom a prefill rank serves."""

from __future__ import annotations

import msgspec
import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.memory import RankMemory
from sglang_prfaas.transport.messages import Hello
from sglang_prfaas.transport.part_memory import SessionView
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.send_table import Load, SendTable

HELLO = Hello(1, "pd", "decode-0", Layout("m", "f", 1, 1, "", (), ()), 4, 1 << 20, b"i" * 16, 0)


@pytest.fixture
def table() -> SendTable:
    return SendTable(VirtualClock(50.0), 300.0)


def a_session(identity: bytes, site: str = "", **changes: object) -> SendSession:
    hello = msgspec.structs.replace(HELLO, **changes)
    return SendSession(identity, hello, TransportConfig(), 0.0, SessionView(HELLO.layout, RankMemory([])), site)


def test_a_session_stands_until_it_is_lost(table: SendTable) -> None:
    session = a_session(b"D1")
    table.add(session)
    assert table.standing() == [session]
    assert table.of_token(session.token) is session
    transfer = table.asked_for(7, session, 1)
    ended = table.lose(session, "it fell silent")
    assert ended is not None
    assert (ended.transfers, ended.connections) == ([transfer], [])
    assert session.closed
    assert table.standing() == []
    assert table.of_token(session.token) is None
    assert table.counts("pd").sessions_ended == 1
    assert table.lose(session, "again") is None
    assert table.counts("pd").sessions_ended == 1


def test_a_decode_rank_is_told_once_why_its_session_ended(table: SendTable) -> None:
    session = a_session(b"D1")
    table.add(session)
    assert table.farewell(b"D1") == ""
    table.lose(session, "it fell silent")
    assert table.farewell(b"D1") == "it fell silent"
    table.told(session)
    assert table.farewell(b"D1") == ""


def test_the_end_of_a_session_leaves_the_one_in_its_place(table: SendTable) -> None:
    old, new = a_session(b"D1"), a_session(b"D1")
    table.add(old)
    table.add(new)
    table.lose(old, "replaced")
    assert table.standing() == [new]
    assert table.of_token(new.token) is new


def test_what_a_new_session_takes_the_place_of(table: SendTable) -> None:
    sessions = [
        a_session(b"D1"),
        a_session(b"D2", rank=1),
        a_session(b"D3", server="decode-1"),
        a_session(b"D4", server=""),
        a_session(b"D5", site="other"),
    ]
    for session in sessions:
        table.add(session)
    nameless = msgspec.structs.replace(HELLO, server="")
    assert table.replaced(b"D9", HELLO) == [sessions[0], sessions[4]]
    assert table.replaced(b"D2", HELLO) == [sessions[0], sessions[1], sessions[4]]
    assert table.replaced(b"D9", nameless) == [], "servers without a name are all different ones"


def test_nothing_is_asked_for_by_a_session_that_has_ended(table: SendTable) -> None:
    session = a_session(b"D1")
    table.add(session)
    table.lose(session, "it fell silent")
    assert table.asked_for(7, session, 1) is None
    assert table.transfers() == []


def test_load(table: SendTable) -> None:
    for session in (a_session(b"D1", "pd", connections=4), a_session(b"D2", "pd", connections=2), a_session(b"D3")):
        table.add(session)
    assert table.load("pd") == Load(3, 10, 2)
    assert table.load("elsewhere") == Load(3, 10, 0)


def test_forgotten_requests_are_counted_with_their_link(table: SendTable) -> None:
    session = a_session(b"D1")
    table.add(session)
    table.asked_for(7, session, 1)
    transfer = table.open(7, 0)
    with transfer.lock:
        transfer.fail("a test")
    assert table.forget(transfer) is session
    assert table.forget(transfer) is None
    assert table.counts("pd").failed == 1


def test_it_closes_once(table: SendTable) -> None:
    transfer = table.open(7, 0)
    assert table.close() == [transfer]
    assert table.closing
    assert table.close() is None
