"""The clients of a bound ZeroMQ socket, and what each may do: a state machine, with the times passed in.

    accepted --first message--> known --over a bound, or off the list--> doomed --LAST_WORDS_S--> cut

A descriptor stands for a connection. Messages are counted in units: one, and one more for each KiB. A client that
sends more than its rate is doomed: nothing it says counts any more, and its source may open no other connection for
`BAN_S`. What it costs the others until then is its burst, shared fairly: ZeroMQ takes turns between connections.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable

from msgspec import Struct

MAX_CLIENTS = 4096
MAX_SOURCE_CLIENTS = 1024
MAX_SILENT = 256
"""Connections that have yet to say something, ZeroMQ's handshake included."""
MAX_SOURCE_SILENT = 128
SILENT_S = 15.0
"""How long one may be silent at first."""
BAN_S = 10.0
LAST_WORDS_S = 0.25
"""Between the refusal and the end of a connection, for the refusal to leave."""
BURST_S = 4.0
"""Units that may come at one go, in seconds of the rate: what was not acknowledged comes again at once."""
UNIT_BYTES = 1024
UNKNOWN_HOST = "an unknown address"

Address = tuple[str, int]


class Doomed(Struct, frozen=True):
    """A client that is going to be cut. identity: its routing id, empty where it has said nothing."""

    descriptor: int
    identity: bytes
    who: str
    reason: str


class _Client:
    def __init__(self, address: Address | None, now_s: float, units: float) -> None:
        self.address = address
        self.host = address[0] if address is not None else UNKNOWN_HOST
        self.source = source_of(self.host)
        self.since_s = self.filled_s = now_s
        self.identity = b""
        """Empty until it says something."""
        self.site = self.key = ""
        self.units = units
        self.doomed_s: float | None = None

    def __str__(self) -> str:
        return f"{self.host} of site {self.site}" if self.site else self.host


class Clients:
    """Of one socket. Not thread-safe. units_per_s: of one client's messages."""

    def __init__(self, units_per_s: float) -> None:
        self._rate = units_per_s
        self._burst = units_per_s * BURST_S
        self._clients: dict[int, _Client] = {}
        """All that have not ended, by descriptor."""
        self._silent: dict[int, _Client] = {}
        """Those of them that have said nothing and are not doomed, the oldest first."""
        self._doomed: dict[int, _Client] = {}
        self._sources: Counter[str] = Counter()
        self._silent_sources: Counter[str] = Counter()
        self._banned: dict[tuple[str, str], float] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def host(self, descriptor: int) -> str:
        """Of a connection that was accepted."""
        client = self._clients.get(descriptor)
        return client.host if client is not None else UNKNOWN_HOST

    def address(self, descriptor: int) -> Address | None:
        """Of a connection that was accepted, as far as it is known."""
        client = self._clients.get(descriptor)
        return client.address if client is not None else None

    def accepted(self, descriptor: int, address: Address | None, now_s: float) -> Doomed | None:
        """A connection. Returns whom there is no room for: of the source that has most connections that have said
        nothing, the oldest of those; where it is the others that are too many, the new one."""
        client = self._add(descriptor, address, now_s)
        own = self._sources[client.source]
        if len(self._clients) - len(self._doomed) > MAX_CLIENTS or own > MAX_SOURCE_CLIENTS:
            return self._doom(descriptor, now_s, f"{own} connections of its address, {len(self._clients)} in all")
        own = self._silent_sources[client.source]
        crowd = client.source
        if own <= MAX_SOURCE_SILENT:
            if len(self._silent) <= MAX_SILENT:
                return None
            crowd, own = self._silent_sources.most_common(1)[0]
        oldest = next(d for d, c in self._silent.items() if c.source == crowd)
        return self._doom(oldest, now_s, f"it has said nothing, nor have {own - 1} others of its address")

    def gone(self, descriptor: int) -> None:
        """A connection has ended."""
        client = self._clients.pop(descriptor, None)
        if client is not None:
            _take(self._sources, client.source)
            self._speaks(descriptor)
            self._doomed.pop(descriptor, None)

    def heard(
        self, descriptor: int, identity: bytes, nbytes: int, now_s: float, proof: Callable[[], tuple[str, str]]
    ) -> Doomed | bool:
        """A message of so many bytes. Returns whether it counts, or that the client is doomed by it. proof: called once
        for each client: the site that it has proved, and its key."""
        client = self._clients.get(descriptor)
        if client is None or client.identity not in (b"", identity):  # the monitor tells of it later than its messages
            address = client.address if client is not None else None
            self.gone(descriptor)
            client = self._add(descriptor, address, now_s)
        if client.doomed_s is not None:
            return False
        if not client.identity:
            self._speaks(descriptor)
            client.identity = identity
            client.site, client.key = proof()
            if self._banned.get((client.source, client.site), now_s) > now_s:
                return self._doom(descriptor, now_s, "another connection of its address sent too many messages")
        client.units = min(self._burst, client.units + (now_s - client.filled_s) * self._rate)
        client.filled_s = now_s
        client.units -= 1 + nbytes / UNIT_BYTES
        if client.units >= 0:
            return True
        self._banned[client.source, client.site] = now_s + BAN_S
        return self._doom(descriptor, now_s, f"it sent too many messages, {self._rate:g} a second are allowed")

    def unlisted(self, listed: Callable[[str, str], bool], now_s: float) -> list[Doomed]:
        """The list of sites has changed: whoever is not on it any more, by site and key, is doomed. So are those that
        have said nothing yet: whose they are is not known; they dial again."""
        found = []
        for descriptor, client in list(self._clients.items()):
            if client.doomed_s is not None:
                continue
            if not client.identity:
                found.append(self._doom(descriptor, now_s, "it has to prove its site again"))
            elif not listed(client.site, client.key):
                found.append(self._doom(descriptor, now_s, f"its key {client.key} is not in peers.toml any more"))
        return found

    def tick(self, now_s: float) -> tuple[list[Doomed], list[int]]:
        """Who is doomed for silence, and which descriptors are to be cut now."""
        late = [d for d, c in self._silent.items() if now_s - c.since_s > SILENT_S]
        silent = [self._doom(descriptor, now_s, f"it has said nothing for {SILENT_S:g} s") for descriptor in late]
        due = [d for d, c in self._doomed.items() if c.doomed_s is not None and now_s - c.doomed_s >= LAST_WORDS_S]
        self._banned = {source: until_s for source, until_s in self._banned.items() if until_s > now_s}
        return silent, due

    def _add(self, descriptor: int, address: Address | None, now_s: float) -> _Client:
        self.gone(descriptor)
        client = self._clients[descriptor] = self._silent[descriptor] = _Client(address, now_s, self._burst)
        self._sources[client.source] += 1
        self._silent_sources[client.source] += 1
        return client

    def _speaks(self, descriptor: int) -> None:
        client = self._silent.pop(descriptor, None)
        if client is not None:
            _take(self._silent_sources, client.source)

    def _doom(self, descriptor: int, now_s: float, reason: str) -> Doomed:
        self._speaks(descriptor)
        client = self._doomed[descriptor] = self._clients[descriptor]
        client.doomed_s = now_s
        return Doomed(descriptor, client.identity, str(client), reason)


def _take(counter: Counter[str], source: str) -> None:
    counter[source] -= 1
    if not counter[source]:
        del counter[source]


def source_of(host: str) -> str:
    """What connections are counted by: an IPv4 address, or the /64 network of an IPv6 one."""
    try:
        parsed = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(parsed, ipaddress.IPv4Address):
        return host
    mapped = parsed.ipv4_mapped
    return str(mapped or ipaddress.ip_network((parsed, 64), strict=False))
