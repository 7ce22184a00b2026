"""The links of a run, in network namespaces of their own: what connects two processes is the same for every mover.

Each has its congestion control set on its routes, which all sockets in the namespace take over, also those of a mover
that has no such setting. Needs root and Linux; without, there is only loopback, as the system has it.
"""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from msgspec import Struct

from tests.transport.namespaces import Namespace, Wire, obstacle

TUN_PATH = "/dev/net/tun"
TUN_SET_INTERFACE, TUN_SET_OFFLOAD = 0x400454CA, 0x400454D0
TUN, NO_PACKET_INFO, VIRTIO_HEADER = 0x0001, 0x1000, 0x4000
CHECKSUM, SEGMENTATION_IPV4, SEGMENTATION_IPV6 = 0x01, 0x02, 0x04
"""include/uapi/linux/if_tun.h"""

MBPS = 1000.0
"""Of the links that are not loopback, with all headers."""
BURST = "256kb"
"""Longer than the kernel's largest segment: tbf would cut a longer one up, at the expense of the sender's CPU."""
ROUND_TRIP_S = 0.05
LINKS = ("loopback", "veth-1gbit", "rtt-50ms")

Within = Callable[[Callable[[], Any]], Any]
"""Calls a function on one side of a link; processes that it starts stay there."""


class Link(Struct, frozen=True):
    """Two sides and what is between them. mbps: what it carries with all headers, 0 for no limit."""

    name: str
    mbps: float
    send_host: str
    receive_host: str
    device: str
    congestion: str
    send_side: Within
    receive_side: Within

    @property
    def most_gb_per_s(self) -> float:
        return self.mbps / 8e3


def here(function: Callable[[], Any]) -> Any:
    return function()


def why_not(name: str) -> str:
    """Why there is no such link here, or an empty string."""
    if name == "loopback":
        return ""
    if name == "rtt-50ms" and not os.access(TUN_PATH, os.R_OK | os.W_OK):
        return f"{TUN_PATH} cannot be opened; the delay line needs it"
    return obstacle()


@contextmanager
def opened(name: str, congestion: str) -> Iterator[Link]:
    """A link, until the end of the block. Raises OSError where it cannot be made."""
    with ExitStack() as stack:

        def namespace() -> Namespace:
            made = Namespace()
            stack.callback(made.close)
            return made

        if name == "loopback":
            yield _loopback(namespace, congestion)
        elif name == "veth-1gbit":
            near, far = namespace(), namespace()
            Wire(near, far, MBPS)
            near.run(f"tc qdisc change dev wire root tbf rate {MBPS:g}mbit burst {BURST} latency 50ms")
            for side, host in ((near, Wire.near_host), (far, Wire.far_host)):
                side.run(f"ip route replace {_network(host)} dev wire src {host} congctl {congestion}")
            yield Link(name, MBPS, Wire.near_host, Wire.far_host, "wire", congestion, near.call, far.call)
        else:
            near, far = namespace(), namespace()
            hosts = ("10.98.0.1", "10.98.0.2")
            ends = []
            for side, host in zip((near, far), hosts, strict=True):
                ends.append(side.call(_tun))
                stack.callback(os.close, ends[-1])
                side.run(f"ip address add {host}/24 dev line")
                side.run("ip link set line up")
                side.run(f"ip route replace {_network(host)} dev line src {host} congctl {congestion}")
            stack.enter_context(_delay_line(*ends))
            yield Link(name, MBPS, *hosts, "line", congestion, near.call, far.call)


def _loopback(namespace: Callable[[], Namespace], congestion: str) -> Link:
    if obstacle():
        with open("/proc/sys/net/ipv4/tcp_congestion_control", encoding="ascii") as file:
            system = file.read().strip()
        return Link("loopback", 0.0, "127.0.0.1", "127.0.0.1", "lo", system, here, here)
    both = namespace()
    for hosts in ("127.0.0.0/8", "127.0.0.1"):
        both.run(f"ip route replace local {hosts} dev lo table local src 127.0.0.1 congctl {congestion}")
    return Link("loopback", 0.0, "127.0.0.1", "127.0.0.1", "lo", congestion, both.call, both.call)


def _network(host: str) -> str:
    return host.rpartition(".")[0] + ".0/24"


def _tun() -> int:
    """A device `line` in this network namespace; what is routed over it comes out of the descriptor, in segments as
    large as the kernel makes them."""
    descriptor = os.open(TUN_PATH, os.O_RDWR | os.O_NONBLOCK)
    flags = TUN | NO_PACKET_INFO | VIRTIO_HEADER
    fcntl.ioctl(descriptor, TUN_SET_INTERFACE, struct.pack("16sH22x", b"line", flags))
    fcntl.ioctl(descriptor, TUN_SET_OFFLOAD, CHECKSUM | SEGMENTATION_IPV4 | SEGMENTATION_IPV6)
    return descriptor


@contextmanager
def _delay_line(near: int, far: int) -> Iterator[None]:
    one_way_s = str(ROUND_TRIP_S / 2)
    command = [sys.executable, "-m", "benchmarks.transport.delay_line", str(near), str(far), one_way_s, str(MBPS)]
    process = subprocess.Popen(command, pass_fds=(near, far), stdin=subprocess.PIPE)
    try:
        yield
        if process.poll() is not None:
            raise OSError(f"the delay line ended with status {process.returncode}")
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(10.0)
