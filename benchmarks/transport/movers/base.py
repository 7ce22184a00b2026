"""What the benchmark asks of a mover: two ends, in a process each, that know the same request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

from msgspec import Struct

from benchmarks.transport.workload import Memory, Workload

POLL_S = 0.0005
DEADLINE_S = 300.0
"""For one request."""


class Arm(Struct, frozen=True):
    """A mover with its settings, under the name that its rows have.

    idle: connections that are open beside those used. keys: a directory with keys of the site `bench`, or empty.
    environment: beside the mover's own. polled: nixl: without threads of its own at the sender. congestion:
    prfaas: instead of the route's congestion control."""

    name: str
    mover: str
    connections: int = 4
    idle: int = 0
    keys: str = ""
    environment: dict[str, str] = {}
    polled: bool = False
    congestion: str = ""


class Place(Struct, frozen=True):
    """Where an arm runs: addresses of its ends, the network device, whether it is loopback."""

    send_host: str
    receive_host: str
    device: str
    loopback: bool


class Job(Struct, frozen=True):
    """What both ends of an arm are told at their start."""

    arm: Arm
    workload: Workload
    place: Place


Offer = dict[str, Any]
"""What one end has to tell the other before the first request."""


class SendingEnd(Protocol):
    """Made first, in the sender's process."""

    offer: Offer
    layerwise: bool
    """Whether it begins before the last layer is computed; `send` computes them then, see `Workload.prefill_s`."""

    def connect(self, offer: Offer) -> Offer:
        """Take what the receiver offers. Returns what is worth reporting of the connections."""

    def send(self, round_: int) -> tuple[float, float]:
        """Move a request. Returns when it began and when the sender knew it to be there (time.monotonic)."""

    def close(self) -> None: ...


class ReceivingEnd(Protocol):
    """Made second, in the receiver's process, with the sender's offer."""

    offer: Offer

    def receive(self, round_: int) -> float:
        """Take part in a request. Returns when its last byte was there, 0.0 where only the sender knows."""

    def close(self) -> None: ...


class Mover(Struct, frozen=True):
    """How to make the two ends; both import what they need when they are called.

    package: of Python, whose version is reported; install: how to get it. environment: set before it is imported.
    spins: its processes take CPU time when there is nothing to do, so that others have to be measured without them."""

    sender: Callable[[Job, Memory], SendingEnd]
    receiver: Callable[[Job, Memory, Offer], ReceivingEnd]
    modules: tuple[str, ...] = ()
    package: str = ""
    install: str = ""
    environment: dict[str, str] = {}
    spins: bool = False


def until(condition: Callable[[], object], timeout_s: float = DEADLINE_S) -> None:
    """Wait. Raises TimeoutError."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {timeout_s:g} s in vain")
        time.sleep(POLL_S)
