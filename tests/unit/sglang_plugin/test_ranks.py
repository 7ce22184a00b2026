"""Which prefill rank a decode rank takes from."""

from __future__ import annotations

import pytest

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.sglang_plugin.ranks import find_rank, split_address
from sglang_prfaas.transport.messages import Directory, RankInfo

ROOM = 987_654_321


def _directory(dp_size: int, tp_size: int, follow: bool = True) -> Directory:
    ranks = tuple(RankInfo(dp, tp, 0, "", 9000 + dp * tp_size + tp) for dp in range(dp_size) for tp in range(tp_size))
    return Directory(True, dp_size, tp_size, 1, follow, ranks)


def test_rank_r_takes_from_rank_r() -> None:
    for tp_rank in range(4):
        rank = find_rank(_directory(1, 4), ROOM, ROOM, tp_rank)
        assert isinstance(rank, RankInfo)
        assert (rank.dp_rank, rank.tp_rank) == (0, tp_rank)


def test_the_dp_rank_follows_the_room_unless_one_is_asked_for() -> None:
    directory = _directory(3, 2)
    derived = find_rank(directory, ROOM, ROOM, 1)
    asked = find_rank(directory, ROOM, 2, 1)
    assert isinstance(derived, RankInfo)
    assert isinstance(asked, RankInfo)
    assert derived.dp_rank == ROOM % 3
    assert asked.dp_rank == 2


def test_why_there_is_none() -> None:
    assert "--load-balance-method follow_bootstrap_room" in str(
        find_rank(_directory(2, 1, follow=False), ROOM, ROOM, 0)
    )
    answer = str(find_rank(_directory(1, 2), ROOM, ROOM, 3))
    assert "TP rank 3" in answer
    assert "1 x 2" in answer


@pytest.mark.parametrize(
    ("address", "parts"), [("10.0.0.1:8998", ("10.0.0.1", 8998)), ("[fd00::1]:80", ("fd00::1", 80)), ("h:1", ("h", 1))]
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:port"])
def test_bad_addresses_say_what_is_expected(address: str) -> None:
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        split_address(address)
