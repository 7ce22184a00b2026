"""What the mover makes of a real link: a veth pair between two network namespaces, limited by tc tbf.

Its rates are so low that a hundredth of a core fills it: what is compared is the link, not the machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.transport.layout import Component
from sglang_prfaas.transport.link_estimator import LinkFigures
from tests.lateness import lateness
from tests.transport.namespaces import Wire, obstacle, wire
from tests.transport.rig import CONFIG, Memory, Pair, layout, some_slots, wait_until

OBSTACLE = obstacle()
pytestmark = pytest.mark.skipif(bool(OBSTACLE), reason=OBSTACLE)

PAGE_BYTES = 1 << 16
PAGES = 256
COUNTS = (PAGES, 1, 1)
TRANSFERS = 3
"""Open at a time, so that there is always something to send."""
SETTLE_S = 2.0
NOTICE_S = 1.5
"""A second and a half, beside what a loaded machine adds."""
DATAGRAM_BYTES = 1472
DATAGRAM_WIRE_BYTES = 1514
WIRE_MBPS = 40.0
HEADERS = 1448 / 1514
"""Payload of a full segment on Ethernet, as tbf counts."""


class Load:
    """Transfers one after another, `TRANSFERS` at a time."""

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in range(TRANSFERS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30.0)

    def _run(self, lane: int) -> None:
        slots = some_slots(lane, COUNTS, COUNTS)
        room = lane * 1_000_000
        while not self._stop.is_set():
            room += 1
            transfer, item = self._pair.ready(room, slots)
            self._pair.send_all(transfer, slots, step=PAGES)
            while item.transfer.live and not self._stop.is_set():
                self._stop.wait(0.005)
            self._pair.receiver.release(item)
            self._pair.sender.release(transfer)


@contextmanager
def movers(link: Wire) -> Iterator[Pair]:
    """A prefill rank in `near`, a decode rank in `far`."""
    of = layout(components=(Component("kv", (PAGE_BYTES,)), Component("mamba", (1 << 16,)), Component("aux", (64,))))
    config = msgspec.structs.replace(CONFIG, chunk_bytes=1 << 18, connections=4, security="off")
    memory = [Memory(of, seed, COUNTS) for seed in (1, None)]
    pair = Pair(
        host=Wire.near_host,
        config=config,
        of=of,
        send_memory=memory[0],
        receive_memory=memory[1],
        within=(link.near.call, link.far.call),
    )
    with pair:
        link.far.call(pair.session)
        wait_until(lambda: pair.sender.links.figures("pd"), "a look at the link")
        yield pair


def figures(pair: Pair) -> LinkFigures:
    found = pair.sender.links.figures("pd")
    assert found is not None
    return found


def seconds_until(condition: Callable[[], bool], what: str) -> float:
    start_s = time.monotonic()
    wait_until(condition, what, 20.0)
    return time.monotonic() - start_s


def near(bytes_per_s: float, mbps: float, tolerance: float = 0.1) -> bool:
    return abs(bytes_per_s / (mbps * 1e6 / 8 * HEADERS) - 1) < tolerance


def full(seen: LinkFigures, mbps: float) -> bool:
    """Whether the link is seen to be filled, and by how much."""
    return seen.filled and near(seen.capacity_bytes_per_s, mbps) and near(seen.used_bytes_per_s, mbps)


@pytest.mark.parametrize(("mbps", "later"), [(100.0, 20.0), (20.0, 100.0)])
def test_the_capacity_is_that_of_the_wire_and_follows_it(mbps: float, later: float) -> None:
    with wire(mbps) as link, movers(link) as pair, Load(pair):
        threading.Event().wait(SETTLE_S)
        seconds_until(lambda: full(figures(pair), mbps), "the first capacity")
        seen = figures(pair)
        assert seen.connections == 4
        with lateness() as late_s:
            link.rate(later)
            took_s = seconds_until(lambda: near(figures(pair).capacity_bytes_per_s, later), "the new capacity")
            added_s = late_s()
        print(
            f"{mbps:g} to {later:g} Mbit/s: {seen.capacity_bytes_per_s * 8e-6:.1f} Mbit/s, noticed in {took_s:.2f} s, "
            f"{added_s:.2f} s of which this process did not run"
        )
        if later < mbps:
            assert took_s < NOTICE_S + added_s


def test_a_competing_flow_leaves_less() -> None:
    with wire(WIRE_MBPS) as link, movers(link) as pair, Load(pair):
        seconds_until(lambda: near(figures(pair).capacity_bytes_per_s, WIRE_MBPS), "the capacity")
        with flow(link, WIRE_MBPS / 2) as carried_mbit:
            threading.Event().wait(SETTLE_S)
            before, start_s = carried_mbit(), time.monotonic()
            ours = []
            for _ in range(20):
                threading.Event().wait(0.1)
                ours.append(figures(pair).capacity_bytes_per_s)
            other = (carried_mbit() - before) / (time.monotonic() - start_s)
        mean = sum(ours) / len(ours)
        print(f"{WIRE_MBPS:g} Mbit/s: {mean * 8e-6 / HEADERS:.0f} left by {other:.0f} of another flow")
        assert other > WIRE_MBPS / 8
        assert near(mean, WIRE_MBPS - other, 0.25), "the largest of the last moments, so rather more than the mean"
        seconds_until(lambda: near(figures(pair).capacity_bytes_per_s, WIRE_MBPS), "all of it again")


@contextmanager
def flow(link: Wire, mbps: float) -> Iterator[Callable[[], float]]:
    """UDP over the same wire at a steady rate at most, in Mbit/s with all headers, to a port that nobody listens on.
    Yields how many Mbit have arrived."""
    sock = link.near.call(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
    stop = threading.Event()

    def send() -> None:
        sent = 0.0
        data = bytes(DATAGRAM_BYTES)
        start_s = time.monotonic()
        while not stop.wait(0.002):
            due = (time.monotonic() - start_s) * mbps
            while sent < due and not stop.is_set():
                sock.sendto(data, (Wire.far_host, 9))
                sent += DATAGRAM_WIRE_BYTES * 8e-6

    with sock:
        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        try:
            yield lambda: link.far.call(datagrams_to_nobody) * DATAGRAM_WIRE_BYTES * 8e-6
        finally:
            stop.set()
            thread.join(10.0)


def datagrams_to_nobody() -> int:
    """`NoPorts` of the calling thread's network namespace."""
    lines = [line.split() for line in Path("/proc/thread-self/net/snmp").read_text().splitlines()]
    names, values = (words for words in lines if words[0] == "Udp:")
    return int(values[names.index("NoPorts")])
