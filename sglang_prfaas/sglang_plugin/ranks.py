"""Which prefill rank sends to a decode rank. Needs no SGLang."""

from __future__ import annotations

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.messages import Directory, RankInfo


def find_rank(directory: Directory, room: int, dp_rank: int, tp_rank: int) -> RankInfo | str:
    """The prefill rank that sends to decode TP rank `tp_rank`, or why there is none.

    dp_rank: as asked for; the room itself where nobody asked for one, which prefill then derives the rank from.
    """
    if dp_rank == room:
        if directory.dp_size > 1 and not directory.follow_bootstrap_room:
            return (
                f"prefill has {directory.dp_size} DP ranks and decode cannot tell which one holds the request; "
                "start prefill with --load-balance-method follow_bootstrap_room"
            )
        dp_rank = room % directory.dp_size
    for rank in directory.ranks:
        if (rank.dp_rank, rank.tp_rank, rank.pp_rank) == (dp_rank, tp_rank, 0):
            return rank
    return (
        f"prefill has no rank for DP rank {dp_rank}, TP rank {tp_rank}: it has {directory.dp_size} x "
        f"{directory.tp_size}, and both sites must use the same attention TP width"
    )


def split_address(address: str) -> tuple[str, int]:
    """`host:port` or `[host]:port`. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"bootstrap address {address!r}: expected HOST:PORT, or [HOST]:PORT for IPv6")
    return host.strip("[]"), int(port)
