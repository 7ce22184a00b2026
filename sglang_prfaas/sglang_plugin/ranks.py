"""Which prefill ranks send to a decode rank. Needs no SGLang."""

from __future__ import annotations

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.messages import Directory, RankInfo
from sglang_prfaas.transport.reshape import peers, width_problem


def find_ranks(directory: Directory, room: int, dp_rank: int, tp_rank: int, tp_size: int) -> list[RankInfo] | str:
    """The prefill ranks that send to decode rank `tp_rank` of `tp_size`, or why there are none.

    dp_rank: as asked for; the room itself where nobody asked for one, which prefill then derives the rank from.
    """
    problem = width_problem(directory.tp_size, tp_size)
    if problem:
        return problem
    if directory.dp_size < 1:
        return f"the bootstrap directory says that prefill has {directory.dp_size} DP ranks, expected 1 or more"
    if dp_rank == room:
        if directory.dp_size > 1 and not directory.follow_bootstrap_room:
            return (
                f"prefill has {directory.dp_size} DP ranks and decode cannot tell which one holds the request; "
                "start prefill with --load-balance-method follow_bootstrap_room"
            )
        dp_rank = room % directory.dp_size
    by_place = {(rank.dp_rank, rank.tp_rank): rank for rank in directory.ranks if rank.pp_rank == 0}
    found = []
    for place in peers(directory.tp_size, tp_size, tp_rank):
        rank = by_place.get((dp_rank, place))
        if rank is None:
            return (
                f"prefill has no rank for DP rank {dp_rank}, TP rank {place}: it has {directory.dp_size} x "
                f"{directory.tp_size}"
            )
        found.append(rank)
    return found


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[host]:port`. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"bootstrap address {address!r}: expected HOST:PORT, or [HOST]:PORT for IPv6")
    return host.strip("[]"), int(port)
