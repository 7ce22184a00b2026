"""Which of the transfers that share a session sends its next chunk: the one with the fewest bytes left, with ageing."""

from __future__ import annotations

from typing import Protocol

AGEING_BYTES_PER_S = 500e6


class Sharing(Protocol):
    """An order of transfers; the smallest key sends next."""

    def key(self, remaining_bytes: int, arrived_s: float) -> float: ...


class ShortestFirst:
    """Shortest remaining first (Schrage 1968); each second of waiting counts as `ageing_bytes_per_s` fewer bytes.

    All transfers age alike, so a key changes only with the bytes left. A transfer of B bytes yields to those that come
    later for at most B / ageing_bytes_per_s seconds, however many they are.
    """

    def __init__(self, ageing_bytes_per_s: float = AGEING_BYTES_PER_S) -> None:
        self.ageing_bytes_per_s = ageing_bytes_per_s

    def key(self, remaining_bytes: int, arrived_s: float) -> float:
        return remaining_bytes + self.ageing_bytes_per_s * arrived_s
