"""The sessions of a decode rank."""

from __future__ import annotations

from sglang_prfaas.clock import Deadline, VirtualClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.memory import RankMemory
from sglang_prfaas.transport.part_memory import SessionView
from sglang_prfaas.transport.receive_session import PeerSession
from sglang_prfaas.transport.receive_table import ReceiveTable


def a_session() -> PeerSession:
    view = SessionView(Layout("m", "f", 1, 1, "", (), ()), RankMemory([]))
    return PeerSession("boot:1", "prefill", 7, Deadline(VirtualClock(0.0), 10.0), TransportConfig(), 0.0, view)


def test_requests_share_the_session_that_stands() -> None:
    table = ReceiveTable()
    session, new = table.enter("prefill", 7, 1, a_session)
    assert new
    assert table.enter("prefill", 7, 2, a_session) == (session, False)
    assert table.enter("prefill", 7, None, a_session) == (session, False)
    assert session.rooms == {1: 1, 2: 1}
    session.leave(1)
    assert session.rooms == {2: 1}
    assert table.standing() == [session]


def test_one_that_has_failed_is_made_anew() -> None:
    table = ReceiveTable()
    failed, _ = table.enter("prefill", 7, 1, a_session)
    failed.failure = "it fell silent"
    session, new = table.enter("prefill", 7, 2, a_session)
    assert new
    assert session is not failed
    assert (failed.rooms, session.rooms) == ({1: 1}, {2: 1})
    table.remove(failed)
    assert table.standing() == [session], "its place is another's"
    table.remove(session)
    assert table.standing() == []


def test_none_is_opened_once_it_is_closed() -> None:
    table = ReceiveTable()
    session, _ = table.enter("prefill", 7, 1, a_session)
    assert table.close() == [session]
    assert table.close() is None
    late, new = table.enter("elsewhere", 7, 1, a_session)
    assert not new
    assert late.failure == "prefill prefill:7: the decode server is stopping"
    assert table.standing() == [session]
