"""How figures of links come from the movers, which live in the servers' scheduler processes, to their site's agent.

The agent binds a ZeroMQ PULL socket on a Unix socket in a directory of mode 0700 and names it to the servers in
`PRFAAS_LINK_REPORTS`. Each mover sends what it sees of every link; the agent puts the movers' views together.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec
import zmq
from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.core.link_capacity import WINDOW_S, LinkCapacity
from sglang_prfaas.core.link_counts import LinkCounts
from sglang_prfaas.monitor.owned_directory import OwnedDirectory, new_path
from sglang_prfaas.monitor.reports import LinkLoad

MAX_MESSAGE_BYTES = 64 << 10
_MESSAGES_A_TURN = 1024
_HIGH_WATER_MARK = 64


class LinkView(Struct, frozen=True, tag="link"):
    """What one mover sees of one link. mover: who, unique in the site (`server/rank`)."""

    mover: str
    load: LinkLoad
    counts: LinkCounts | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LinkView)


def merge(
    views: Iterable[LinkLoad], configured_bytes_per_s: float = 0.0, together_bytes_per_s: float = 0.0
) -> LinkLoad:
    """Several movers' views of one direction of a link as one. Raises ValueError for none.

    Traffic, backlog and connections add up; loss and round-trip time are means weighted by traffic; the capacity is
    what they were seen to fill the link with together, else the largest that one of them measured, else the configured
    one; one mover that sees congestion is enough, and the youngest view gives the age."""
    loads = list(views)
    if not loads:
        raise ValueError("no view of the link")
    used = sum(load.used_bytes_per_s for load in loads)
    timed = [load for load in loads if load.rtt_s > 0]

    def mean(values: list[tuple[float, float]]) -> float:
        weight = sum(weight for _, weight in values)
        if weight > 0:
            return sum(value * weight for value, weight in values) / weight
        return sum(value for value, _ in values) / len(values) if values else 0.0

    return LinkLoad(
        from_site=loads[0].from_site,
        to_site=loads[0].to_site,
        used_bytes_per_s=used,
        capacity_bytes_per_s=together_bytes_per_s
        or max(load.capacity_bytes_per_s for load in loads)
        or configured_bytes_per_s,
        loss_fraction=mean([(load.loss_fraction, load.used_bytes_per_s) for load in loads]),
        rtt_s=mean([(load.rtt_s, load.used_bytes_per_s) for load in timed]),
        min_rtt_s=min((load.min_rtt_s for load in loads if load.min_rtt_s > 0), default=0.0),
        backlog_bytes=sum(load.backlog_bytes for load in loads),
        connections=sum(load.connections for load in loads),
        filled=any(load.filled for load in loads),
        congested=any(load.congested for load in loads),
        congestion=next((load.congestion for load in loads if load.congested), ""),
        age_s=min(load.age_s for load in loads),
    )


class LinkViews:
    """The newest view of every mover; those of movers that fell silent are forgotten. Pure, not thread-safe."""

    def __init__(self, clock: Clock, *, configured_bytes_per_s: dict[str, float], silent_after_s: float = 5.0) -> None:
        """configured_bytes_per_s: capacity of the link to each site, where none was measured."""
        self._clock = clock
        self._configured = configured_bytes_per_s
        self._silent_after_s = silent_after_s
        self._views: dict[tuple[str, str, str], tuple[float, LinkLoad]] = {}
        self._counts: dict[tuple[str, str, str], LinkCounts] = {}
        self._together: dict[tuple[str, str], LinkCapacity] = {}
        """Of links that several movers share: none of them sees more than its own share."""

    def seen(self, view: LinkView) -> None:
        """Take in what a mover says."""
        load = view.load
        now_s = self._clock.now_s()
        pair = (load.from_site, load.to_site)
        self._views[*pair, view.mover] = (now_s, load)
        if view.counts is not None:
            self._counts[*pair, view.mover] = view.counts
        loads = [one for key, (at_s, one) in self._views.items() if key[:2] == pair and now_s - at_s <= WINDOW_S]
        if len(loads) > 1:
            together = self._together.setdefault(pair, LinkCapacity(self._configured.get(load.to_site, 0.0)))
            learn = together.filled if any(one.filled for one in loads) else together.at_least
            learn(now_s, sum(one.used_bytes_per_s for one in loads))

    def links(self) -> list[LinkLoad]:
        """All links that a mover has told of lately, in the order of their names."""
        now_s = self._clock.now_s()
        by_link: dict[tuple[str, str], list[LinkLoad]] = {}
        for key, (at_s, load) in sorted(self._views.items(), key=lambda item: item[0]):
            if now_s - at_s > self._silent_after_s:
                del self._views[key]
                self._counts.pop(key, None)
                continue
            aged = msgspec.structs.replace(load, age_s=load.age_s + now_s - at_s)
            by_link.setdefault(key[:2], []).append(aged)
        for pair in self._together.keys() - {pair for pair, loads in by_link.items() if len(loads) > 1}:
            del self._together[pair]
        return [
            merge(
                loads,
                self._configured.get(pair[1], 0.0),
                self._together[pair].at(now_s) if pair in self._together else 0.0,
            )
            for pair, loads in by_link.items()
        ]

    def counts(self) -> dict[tuple[str, str, str], LinkCounts]:
        """By from site, to site and mover, of those that have told lately."""
        return {key: self._counts[key] for key in sorted(self._counts)}


def new_endpoint() -> str:
    """An endpoint of its own for one agent: a Unix socket in a directory that is yet to be made."""
    return f"ipc://{new_path()}/links"


class LinkSender:
    """A mover's end. Never blocks: what the agent does not take is dropped. Belongs to one thread."""

    def __init__(self, endpoint: str, mover: str) -> None:
        self._mover = mover
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)

    def send(self, load: LinkLoad, counts: LinkCounts | None = None) -> bool:
        """Tell the agent; whether there was room for it."""
        try:
            self._socket.send(_encoder.encode(LinkView(self._mover, load, counts)), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close()
        self._context.term()


class LinkReceiver:
    """The agent's end, polled by its owner: `drain` takes in what has come. Belongs to one thread."""

    def __init__(self, endpoint: str) -> None:
        """endpoint: of `new_endpoint`; its directory is made. Raises OSError where that exists."""
        self._directory = OwnedDirectory(Path(endpoint.removeprefix("ipc://")).parent)
        self.refused = 0
        """Messages that were none."""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)

    def drain(self, views: LinkViews) -> int:
        """Hand over everything that has come, at most a turn's worth. Returns how many messages there were."""
        for count in range(_MESSAGES_A_TURN):
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return count
            try:
                views.seen(_decoder.decode(data))
            except msgspec.DecodeError:
                self.refused += 1
        return _MESSAGES_A_TURN

    def close(self) -> None:
        """Close the socket and delete its directory."""
        self._socket.close()
        self._context.term()
        self._directory.remove()
