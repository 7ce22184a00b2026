"""Two ends of a mover in one process, with memory that can be compared."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.transport.layout import Component, Layout
from sglang_prfaas.transport.link_monitor import Report
from sglang_prfaas.transport.memory import HostBuffer, RankMemory
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.receive_mover import Incoming, PeerSession, ReceiveMover
from sglang_prfaas.transport.send_mover import SendMover
from sglang_prfaas.transport.transfer import State, Transfer

DEADLINE_S = 60.0
"""How long a test waits for an event that should come in milliseconds."""

AT_ONCE_S = 10.0
"""Refusals come in milliseconds; this is below the handshake timeout of 20 s."""

CONFIG = TransportConfig(
    connections=3,
    chunk_bytes=4096,
    handshake_timeout_s=20.0,
    heartbeat_interval_s=0.2,
    heartbeat_timeout_s=20.0,
)

ONE_CONNECTION = msgspec.structs.replace(CONFIG, connections=1)

PAGES, STATES, AUX = 0, 1, 2
SLOTS = (64, 8, 16)


def layout(**changes: Any) -> Layout:
    """A small hybrid: two buffers of pages (one item per page below a chunk, one above), state larger than a chunk."""
    values: dict[str, Any] = {
        "model": "Hybrid-abc",
        "kv_dtype": "float16",
        "page_tokens": 16,
        "tp_size": 1,
        "kv_format": "",
        "layer_ids": (1, 3),
        "components": (
            Component("kv", (1000, 5000)),
            Component("mamba", (9001, 300, 12288)),
            Component("aux", (64, 8)),
        ),
    }
    return Layout(**{**values, **changes})


class Memory:
    """Buffers of a layout in numpy arrays, with a pattern in them or zeros."""

    def __init__(self, of: Layout, seed: int | None, slots: Sequence[int] = SLOTS) -> None:
        rng = np.random.default_rng(seed)
        self.arrays: list[list[npt.NDArray[np.uint8]]] = [
            [
                np.zeros((n, size), np.uint8) if seed is None else rng.integers(0, 256, (n, size), dtype=np.uint8)
                for size in component.item_bytes
            ]
            for component, n in zip(of.components, slots, strict=True)
        ]
        self.rank = RankMemory([[HostBuffer(a.ctypes.data, a.nbytes, a.shape[1]) for a in c] for c in self.arrays])

    def copy(self) -> list[list[npt.NDArray[np.uint8]]]:
        return [[a.copy() for a in component] for component in self.arrays]


def flat(components: list[list[npt.NDArray[np.uint8]]]) -> list[npt.NDArray[np.uint8]]:
    """All buffers of all components."""
    return [buffer for component in components for buffer in component]


Slots = list[npt.NDArray[np.int64]]


def some_slots(seed: int, counts: Sequence[int] = (20, 2, 1), slots: Sequence[int] = SLOTS) -> Slots:
    """Scattered slots for a request."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(n)[:count].astype(np.int64) for n, count in zip(slots, counts, strict=True)]


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll until `condition` holds. Raises AssertionError with `what`."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        threading.Event().wait(0.002)


def ended(transfer: Transfer) -> bool:
    return not transfer.live


def wait_ended(*transfers: Transfer) -> None:
    for transfer in transfers:
        wait_until(partial(ended, transfer), f"end of room {transfer.room}, it is {transfer.state}")


def _here(function: Callable[[], Any]) -> Any:
    return function()


class Pair:
    """A prefill rank and a decode rank. Use in a `with`."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        config: TransportConfig = CONFIG,
        decode_config: TransportConfig | None = None,
        of: Layout | None = None,
        decode_layout: Layout | None = None,
        send_memory: Any = None,
        receive_memory: Any = None,
        first_port: int = 0,
        site: str = "pd",
        links: dict[str, LinkConfig] | None = None,
        decode_links: dict[str, LinkConfig] | None = None,
        prefill_site: str = "",
        report: Report | None = None,
        within: tuple[Callable[[Callable[[], Any]], Any], Callable[[Callable[[], Any]], Any]] | None = None,
    ) -> None:
        """site: of the decode rank. within: callers of functions for the prefill and the decode rank, in the network
        namespaces of either."""
        self._in_prefill, self._in_decode = within or (_here, _here)
        self.host = host
        self.layout = of or layout()
        self.source = send_memory or Memory(self.layout, 1)
        self.target = receive_memory or Memory(decode_layout or self.layout, None)
        clock = MonotonicClock()
        self.sender: SendMover = self._in_prefill(
            lambda: SendMover(
                self.layout,
                self.source.rank,
                config,
                clock,
                host=host,
                first_port=first_port,
                links=links,
                report=report,
                site=prefill_site,
            )
        )
        self.receiver: ReceiveMover = self._in_decode(
            lambda: ReceiveMover(
                decode_layout or self.layout,
                self.target.rank,
                decode_config or config,
                clock,
                site=site,
                server="decode-0",
                links=decode_links,
            )
        )

    def __enter__(self) -> Pair:
        self._in_prefill(self.sender.start)
        self._in_decode(self.receiver.start)
        return self

    def __exit__(self, *_: object) -> None:
        self.receiver.close()
        self.sender.close()

    def dial(self, receiver: ReceiveMover | None = None) -> PeerSession:
        """A session that may not be up yet."""
        return (receiver or self.receiver).session("127.0.0.1:1", self.host, self.sender.control_port)

    def session(self, receiver: ReceiveMover | None = None) -> PeerSession:
        """A session that is up."""
        session = self.dial(receiver)
        wait_until(lambda: session.up or session.failure, "session up")
        assert session.up, session.failure
        return session

    def ready(self, room: int, slots: Slots) -> tuple[OutgoingTransfer, Incoming]:
        """A transfer that both ends know of, started."""
        item = self.receiver.expect(self.session(), room, slots, 0)
        transfer = self.sender.transfer(room)
        wait_until(lambda: transfer.expected, "decode asked for the room")
        with transfer.lock:
            transfer.start(len(slots[PAGES]))
        return transfer, item

    def send_all(self, transfer: OutgoingTransfer, slots: Slots, step: int = 7) -> None:
        """Send everything as chunked prefill does: pages bit by bit, the rest with the last ones."""
        for first in range(0, len(slots[PAGES]), step):
            self.sender.send(transfer, PAGES, first, slots[PAGES][first : first + step])
        for component in range(1, len(slots)):
            if len(slots[component]):
                self.sender.send(transfer, component, 0, slots[component])
        self.sender.finish(transfer)


def assert_moved(source: Memory, source_slots: Slots, target: Memory, target_slots: Slots) -> None:
    """Every item equal."""
    for component, (ours, theirs) in enumerate(zip(source.arrays, target.arrays, strict=True)):
        for ours_buffer, theirs_buffer in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(ours_buffer[source_slots[component]], theirs_buffer[target_slots[component]])


def works(pair: Pair, room: int) -> None:
    """A whole transfer, in a new session where the old one has failed."""
    slots = some_slots(room)
    transfer, item = pair.ready(room, slots)
    pair.send_all(transfer, slots)
    wait_ended(transfer, item.transfer)
    assert (transfer.state, item.transfer.state) == (State.DONE, State.DONE), transfer.reason
    assert_moved(pair.source, slots, pair.target, slots)
    pair.sender.release(transfer)
    pair.receiver.release(item)


def lines(caplog: pytest.LogCaptureFixture, *parts: str) -> list[str]:
    """Warnings that hold all of `parts`."""
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if all(part in message for part in parts)]
