"""The state behind a bootstrap directory, and addresses."""

from __future__ import annotations

import socket

import pytest

from sglang_prfaas.errors import LocalError, ProtocolError
from sglang_prfaas.transport.addresses import dialable, endpoint, is_numeric, resolve
from sglang_prfaas.transport.directory import RankTable, is_local
from sglang_prfaas.transport.messages import Deregister, InnerRail, RankInfo, Register


def rank(tp: int = 0, dp: int = 0, port: int = 7000) -> RankInfo:
    return RankInfo(dp, tp, 0, "", port)


def register(info: RankInfo, boot_id: str = "boot", tp_size: int = 2, dp_size: int = 1) -> Register:
    return Register(info, boot_id, dp_size, tp_size, 1, True)


def test_an_empty_directory_is_incomplete() -> None:
    found = RankTable().directory()
    assert not found.complete
    assert found.ranks == ()


def test_complete_once_every_rank_is_there() -> None:
    table = RankTable()
    table.register(register(rank(0)))
    assert not table.directory().complete
    table.register(register(rank(0)))
    assert not table.directory().complete
    table.register(register(rank(1, port=7002)))
    found = table.directory()
    assert found.complete
    assert (found.dp_size, found.tp_size, found.pp_size, found.follow_bootstrap_room) == (1, 2, 1, True)
    assert {(r.tp_rank, r.control_port) for r in found.ranks} == {(0, 7000), (1, 7002)}


def test_a_restarted_rank_takes_the_place_of_the_old_one() -> None:
    table = RankTable()
    table.register(register(rank(0), "old", tp_size=1))
    table.register(register(rank(0, port=9000), "new", tp_size=1))
    assert [r.control_port for r in table.directory().ranks] == [9000]
    table.deregister(Deregister(rank(0), "old"))
    assert table.directory().complete, "the old process cannot take the new one's entry away"
    table.deregister(Deregister(rank(0), "new"))
    assert not table.directory().complete


def test_the_page_size_of_the_server() -> None:
    table = RankTable()
    assert table.directory().page_tokens == 0
    table.register(Register(rank(0), "boot", 1, 1, 1, True, 64))
    assert table.directory().page_tokens == 64


def test_inner_rails_are_told_to_whom_they_may_be() -> None:
    table = RankTable()
    rail = InnerRail("mooncake", "pd", "10.0.0.1", 9000)
    info = RankInfo(0, 0, 0, "", 7000, rail)
    table.register(register(info, tp_size=1))
    assert table.directory().ranks == (info,)
    assert table.directory(with_rails=False).ranks == (rank(0),)


def test_other_sizes_drop_the_ranks_of_the_old_ones() -> None:
    table = RankTable()
    table.register(register(rank(0)))
    table.register(register(rank(1)))
    table.register(register(rank(0), "new", tp_size=4))
    found = table.directory()
    assert not found.complete
    assert len(found.ranks) == 1


def test_leaving_what_was_never_there() -> None:
    table = RankTable()
    table.deregister(Deregister(rank(0), "boot"))
    assert not table.directory().complete


@pytest.mark.parametrize(("info", "message"), [(rank(2), "TP rank 2 of 2"), (rank(0, dp=1), "DP rank 1 of 1")])
def test_ranks_beyond_their_own_size_are_refused(info: RankInfo, message: str) -> None:
    table = RankTable()
    with pytest.raises(ProtocolError, match=message):
        table.register(register(info))
    assert table.directory().ranks == ()


@pytest.mark.parametrize(
    ("address", "host", "local"),
    [
        ("127.0.0.1", "0.0.0.0", True),
        ("127.8.9.1", "0.0.0.0", True),
        ("::1", "::", True),
        ("::ffff:127.0.0.1", "::", True),
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.8", "10.0.0.7", False),
        ("::ffff:10.0.0.8", "::", False),
        ("fe80::1%eth0", "::", False),
        ("", "0.0.0.0", False),
        ("", "", False),
        ("not an address", "0.0.0.0", False),
    ],
)
def test_who_is_on_this_host(address: str, host: str, local: bool) -> None:
    assert is_local(address, host) is local


def test_addresses() -> None:
    assert endpoint("::1", 80) == "tcp://[::1]:80"
    assert endpoint("10.0.0.1", 80) == "tcp://10.0.0.1:80"
    assert dialable("0.0.0.0") == "127.0.0.1"
    assert dialable("::") == "::1"
    assert dialable("10.0.0.1") == "10.0.0.1"
    assert is_numeric("fe80::1%eth0")
    assert not is_numeric("localhost")


def test_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("") == resolve("*") == "0.0.0.0"
    assert resolve("[::1]") == "::1"
    assert resolve("10.1.2.3") == "10.1.2.3"

    def lookup(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host != "prefill.example":
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.5", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert resolve("prefill.example") == "10.0.0.5"
    with pytest.raises(LocalError, match=r"host 'nowhere\.example' cannot be resolved: .*not known"):
        resolve("nowhere.example")
