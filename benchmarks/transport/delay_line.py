"""A link with a round trip time, as a process between two TUN devices: packets come out later than they went in.

    python -m benchmarks.transport.delay_line NEAR FAR ONE_WAY_S MBPS

NEAR and FAR: descriptors of the devices, with virtio headers. Each direction carries MBPS and delays by ONE_WAY_S; up
to three times the bandwidth-delay product waits, more is dropped. Ends when its standard input does.
"""

from __future__ import annotations

import os
import select
import struct
import sys
import time
from collections import deque

HEADER_BYTES = 10
"""struct virtio_net_hdr: flags, type, length of the headers, bytes of a segment, where to checksum."""
FRAME_BYTES = 14
"""Ethernet, as tbf counts a veth's packets."""
LARGEST_BYTES = HEADER_BYTES + 65_536
BUFFERED = 3.0


def wire_bytes(packet: bytes) -> int:
    """What a packet takes on the wire, where a large one goes as segments with headers of their own."""
    length = len(packet) - HEADER_BYTES
    kind, header_bytes, segment_bytes = struct.unpack_from("=xBHH", packet)
    if not kind or not segment_bytes:
        return length + FRAME_BYTES
    segments = -(-(length - header_bytes) // segment_bytes)
    return length + (segments - 1) * header_bytes + segments * FRAME_BYTES


class Direction:
    """One way over the link: at its rate, then its delay. The clock is the caller's."""

    def __init__(self, mbps: float, delay_s: float) -> None:
        self._bytes_per_s = mbps * 125_000
        self._delay_s = delay_s
        self._buffer_s = BUFFERED * 2 * delay_s
        self._free_s = 0.0
        self._packets: deque[tuple[float, bytes]] = deque()
        self.dropped = 0

    def put(self, packet: bytes, now_s: float) -> None:
        begins_s = max(now_s, self._free_s)
        if begins_s - now_s > self._buffer_s:
            self.dropped += 1
            return
        self._free_s = begins_s + wire_bytes(packet) / self._bytes_per_s
        self._packets.append((self._free_s + self._delay_s, packet))

    def due(self, now_s: float) -> bytes | None:
        """The next packet that has arrived."""
        if self._packets and self._packets[0][0] <= now_s:
            return self._packets.popleft()[1]
        return None

    def wait_s(self, now_s: float) -> float | None:
        """Until the next packet arrives; None where there is none."""
        return max(0.0, self._packets[0][0] - now_s) if self._packets else None


def relay(near: int, far: int, delay_s: float, mbps: float) -> None:
    ways = {near: (Direction(mbps, delay_s), far), far: (Direction(mbps, delay_s), near)}
    poll = select.epoll()
    for descriptor in (*ways, sys.stdin.fileno()):
        poll.register(descriptor, select.EPOLLIN)
    while True:
        waits = [wait for way, _ in ways.values() if (wait := way.wait_s(time.monotonic())) is not None]
        ready = poll.poll(min(waits, default=-1))
        for descriptor, _ in ready:
            if descriptor not in ways:
                return
            _read(descriptor, ways[descriptor][0])
        for way, to in ways.values():
            while (packet := way.due(time.monotonic())) is not None:
                os.write(to, packet)


def _read(descriptor: int, way: Direction) -> None:
    while True:
        try:
            packet = os.read(descriptor, LARGEST_BYTES)
        except BlockingIOError:
            return
        way.put(packet, time.monotonic())


if __name__ == "__main__":
    relay(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
