"""Which key a server that is dialled has to prove that it holds."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from sglang_prfaas.errors import LocalError

ROUNDS = 2
"""How often every key is tried before a server counts as refusing: one may also be about to end, or to begin."""


class ServerKey(Struct, frozen=True):
    """A CURVE public key (Z85) and whose it is; both empty where no keys are used."""

    site: str
    public: bytes


class ServerKeys:
    """The key that the server behind a bootstrap address has (`host:port`, `[host]:port`), found by trying those there
    are for it.

    There is more than one while a site exchanges its keys, and for hosts that peers.toml gives to no site alone. Not
    thread-safe."""

    def __init__(self, candidates: Callable[[str], tuple[ServerKey, ...]]) -> None:
        self._candidates = candidates
        self._turn: dict[str, int] = {}
        self._failures: dict[str, int] = {}

    def get(self, address: str) -> ServerKey:
        """The last key that was right, or the next to try. Raises LocalError where no site is known at the host."""
        host = address.rpartition(":")[0].strip("[]")
        candidates = self._candidates(host)
        if not candidates:
            raise LocalError(f"peers.toml has no site at {host}; add it to the addresses of its site")
        return candidates[self._turn.get(address, 0) % len(candidates)]

    def accepted(self, address: str) -> None:
        """The server has proved the key of `get`."""
        self._failures.pop(address, None)

    def refused(self, address: str, key: ServerKey) -> bool:
        """The server does not hold `key`, or refuses ours: the next attempt takes the next one. Returns whether all
        were refused since the last one that was right, `ROUNDS` times."""
        host = address.rpartition(":")[0].strip("[]")
        candidates = self._candidates(host)
        if candidates and self.get(address) != key:
            return False  # another attempt has gone on already, or peers.toml has changed
        self._turn[address] = self._turn.get(address, 0) + 1
        failures = self._failures.pop(address, 0) + 1
        if failures >= ROUNDS * len(candidates):
            return True
        self._failures[address] = failures
        return False
