"""What a run measures: which arms over which link with which workload, and how often."""

from __future__ import annotations

from collections.abc import Collection

from msgspec import Struct

from benchmarks.transport.movers.base import Arm
from benchmarks.transport.movers.mooncake import LARGE_SLICES

PEERS = ("mooncake", "nixl")
TUNED = "mooncake+1mib"
POLLED = "nixl+polled"
BBR = "prfaas+bbr"
FEWER = "prfaas+2"
MANY_CONNECTIONS = 256


class Study(Struct, frozen=True):
    """`warmups` rounds are not counted. movers: names of arms, see `arm_of`."""

    link: str
    workload: str
    rounds: int
    warmups: int
    movers: tuple[str, ...]


MOVERS = ("prfaas", *PEERS, "plain")
WITH_IPERF3 = (*MOVERS, "iperf3")
WITH_TLS = (*MOVERS, TUNED, POLLED, "prfaas+tls")
LARGE = (*WITH_TLS, FEWER)

FULL = (
    Study("loopback", "block", 9, 1, (*WITH_IPERF3, TUNED, POLLED, "prfaas+tls", FEWER)),
    Study("loopback", "dense", 5, 1, LARGE),
    Study("loopback", "hybrid", 7, 1, (*LARGE, "prfaas+256")),
    Study("loopback", "small", 15, 3, WITH_TLS),
    Study("loopback", "small-serial", 7, 1, WITH_TLS),
    Study("veth-1gbit", "block", 3, 0, WITH_IPERF3),
    Study("veth-1gbit", "hybrid", 3, 0, (*MOVERS, POLLED)),
    Study("veth-1gbit", "hybrid-layers", 2, 0, MOVERS),
    Study("rtt-50ms", "block", 3, 0, (*WITH_IPERF3, BBR)),
    Study("rtt-50ms", "hybrid", 3, 0, ("prfaas", BBR, "plain")),
    Study("rtt-50ms", "dense", 2, 0, ("prfaas", BBR, "plain")),
)
QUICK = (
    Study("loopback", "block", 2, 1, WITH_IPERF3),
    Study("loopback", "dense", 1, 1, MOVERS),
    Study("loopback", "hybrid", 2, 1, (*MOVERS, "prfaas+tls", "prfaas+256")),
    Study("loopback", "small", 5, 1, MOVERS),
    Study("loopback", "small-serial", 1, 1, MOVERS),
    Study("veth-1gbit", "block", 1, 0, WITH_IPERF3),
    Study("veth-1gbit", "hybrid-layers", 1, 0, ("prfaas", "plain")),
    Study("rtt-50ms", "hybrid", 1, 0, ("prfaas", "plain")),
)
ARMS = (*WITH_IPERF3, TUNED, POLLED, "prfaas+tls", "prfaas+256", FEWER, BBR)


def arm_of(name: str, connections: int, keys: str) -> Arm:
    """The arm of a name. keys: directory of the site `bench`."""
    mover = name.partition("+")[0]
    if name == "prfaas+tls":
        return Arm(name, mover, connections, keys=keys)
    if name == BBR:
        return Arm(name, mover, connections, congestion="bbr")
    if name == FEWER:
        return Arm(name, mover, 2)
    if name == "prfaas+256":
        return Arm(name, mover, connections, idle=MANY_CONNECTIONS)
    if name == POLLED:
        return Arm(name, mover, connections, polled=True)
    return Arm(name, mover, connections, environment=LARGE_SLICES if name == TUNED else {})


def chosen(
    studies: Collection[Study], links: Collection[str], workloads: Collection[str], arms: Collection[str], rounds: int
) -> list[Study]:
    """The studies with only these links, workloads and arms; `rounds` of each where that is not 0."""
    found = []
    for study in studies:
        movers = tuple(name for name in study.movers if name in arms)
        if study.link in links and study.workload in workloads and movers:
            found.append(Study(study.link, study.workload, rounds or study.rounds, study.warmups, movers))
    return found
