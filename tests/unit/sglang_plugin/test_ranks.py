"""Which prefill rank a decode rank takes from."""

from __future__ import annotations

import msgspec
import pytest

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.sglang_plugin.ranks import find_ranks, split_address
from sglang_prfaas.transport.messages import Directory, RankInfo

ROOM = 987_654_321


def _directory(dp_size: int, tp_size: int, follow: bool = True) -> Directory:
    ranks = tuple(RankInfo(dp, tp, 0, "", 9000 + dp * tp_size + tp) for dp in range(dp_size) for tp in range(tp_size))
    return Directory(True, dp_size, tp_size, 1, follow, ranks)


def _found(directory: Directory, dp_rank: int, tp_rank: int, tp_size: int) -> list[tuple[int, int]]:
    ranks = find_ranks(directory, ROOM, dp_rank, tp_rank, tp_size)
    assert not isinstance(ranks, str), ranks
    return [(rank.dp_rank, rank.tp_rank) for rank in ranks]


def test_rank_r_takes_from_rank_r() -> None:
    for tp_rank in range(4):
        assert _found(_directory(1, 4), ROOM, tp_rank, 4) == [(0, tp_rank)]


def test_different_widths() -> None:
    assert _found(_directory(1, 4), ROOM, 1, 2) == [(0, 2), (0, 3)]
    assert [_found(_directory(1, 2), ROOM, rank, 4) for rank in range(4)] == [[(0, 0)], [(0, 0)], [(0, 1)], [(0, 1)]]


def test_the_dp_rank_follows_the_room_unless_one_is_asked_for() -> None:
    directory = _directory(3, 2)
    assert _found(directory, ROOM, 1, 2) == [(ROOM % 3, 1)]
    assert _found(directory, 2, 1, 2) == [(2, 1)]


def test_why_there_is_none() -> None:
    assert "--load-balance-method follow_bootstrap_room" in str(
        find_ranks(_directory(2, 1, follow=False), ROOM, ROOM, 0, 1)
    )
    assert find_ranks(_directory(1, 2), ROOM, ROOM, 0, 3) == (
        "attention TP width: prefill has 2, decode has 3; one must be a multiple of the other"
    )
    assert find_ranks(_directory(1, 128), ROOM, ROOM, 0, 1) == (
        "attention TP width: prefill has 128, decode has 1; one may be at most 64 times the other"
    )
    nobody = msgspec.structs.replace(_directory(1, 2), dp_size=0)
    assert find_ranks(nobody, ROOM, ROOM, 0, 2) == (
        "the bootstrap directory says that prefill has 0 DP ranks, expected 1 or more"
    )
    incomplete = msgspec.structs.replace(_directory(1, 2), ranks=_directory(1, 2).ranks[:1])
    assert find_ranks(incomplete, ROOM, ROOM, 1, 2) == "prefill has no rank for DP rank 0, TP rank 1: it has 1 x 2"


@pytest.mark.parametrize(
    ("address", "parts"), [("10.0.0.1:8998", ("10.0.0.1", 8998)), ("[fd00::1]:80", ("fd00::1", 80)), ("h:1", ("h", 1))]
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:port"])
def test_bad_addresses_say_what_is_expected(address: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        split_address(address)
