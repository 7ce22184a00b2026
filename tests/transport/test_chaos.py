"""Transfers over links that reset, cut, stall and corrupt, and beside peers that are replaced: every one is complete
and equal, or has failed with a reason on both sides. PRFAAS_CHAOS: how many (default 60); PRFAAS_CHAOS_SEED: which."""

from __future__ import annotations

import os
import random
import threading

import msgspec
import numpy as np
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.errors import PeerGoneError
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.transfer import State
from tests.transport.relay import FaultyRelay
from tests.transport.rig import CONFIG, PAGES, Pair, assert_moved, some_slots, wait_until

TRANSFERS = int(os.environ.get("PRFAAS_CHAOS", "60"))
SEED = int(os.environ.get("PRFAAS_CHAOS_SEED", "7"))
LIMIT_S = 60.0
"""No transfer may take longer; most take milliseconds."""
RESTART_EVERY = 25

CHAOS = msgspec.structs.replace(
    CONFIG, heartbeat_timeout_s=3.0, reconnect_timeout_s=5.0, handshake_timeout_s=5.0, closed_timeout_s=3.0
)


class Faults:
    """Does something to the link every now and then. Use in a `with`."""

    def __init__(self, control: FaultyRelay, data: FaultyRelay, rng: random.Random) -> None:
        self.control, self.data, self.rng = control, data, rng
        self.stopping = threading.Event()
        self.done: dict[str, int] = {}
        self.thread = threading.Thread(target=self.run, name="faults", daemon=True)

    def run(self) -> None:
        acts = {
            "reset": lambda: self.data.reset_one(),
            "reset control": lambda: self.control.reset_one(),
            "cut": lambda: (self.control.cut(0.4), self.data.cut(0.4)),
            "stall": lambda: self.data.stall_one(0.3),
        }
        names = ["reset"] * 6 + ["stall"] * 4 + ["reset control"] * 2 + ["cut"]
        while not self.stopping.wait(self.rng.uniform(0.02, 0.2)):
            name = self.rng.choice(names)
            acts[name]()
            self.done[name] = self.done.get(name, 0) + 1

    def __enter__(self) -> Faults:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join(30.0)


@pytest.mark.usefixtures("sending")
def test_chaos() -> None:
    rng = random.Random(SEED)
    outcomes: dict[str, int] = {}
    resent = corrupt = 0
    with Pair(config=CHAOS) as pair:
        control, data = FaultyRelay(pair.sender.control_port, SEED), FaultyRelay(pair.sender.data_port, SEED + 1)
        data.corrupt_rate = 0.05
        real_port, pair.sender.control_port = pair.sender.control_port, control.port
        pair.sender._handshake.data_port = data.port
        try:
            with Faults(control, data, random.Random(SEED + 2)) as faults:
                for room in range(TRANSFERS):
                    if room and room % RESTART_EVERY == 0:
                        pair.receiver.close("chaos: a decode process ends")
                        pair.receiver = ReceiveMover(
                            pair.layout, pair.target.rank, CHAOS, MonotonicClock(), site="pd", server="decode-0"
                        )
                        pair.receiver.start()
                    outcome, again, bad = one(pair, room, rng)
                    outcomes[outcome] = outcomes.get(outcome, 0) + 1
                    resent, corrupt = resent + again, corrupt + bad
        finally:
            control.close()
            data.close()
            pair.sender.control_port = real_port
        assert pair.sender._table.transfers() == []
    print(
        f"outcomes {outcomes}, faults {faults.done}, {resent} chunks resent, {corrupt} corrupt, {data.corrupted} bits"
    )
    assert outcomes.get("done", 0) > TRANSFERS * 0.8, outcomes


def one(pair: Pair, room: int, rng: random.Random) -> tuple[str, int, int]:
    """A transfer, on which nothing but this may be found; returns how it ended, and its chunks resent and corrupt."""
    ours, theirs = some_slots(rng.randrange(1 << 30)), some_slots(rng.randrange(1 << 30))
    for component in pair.target.arrays:
        for buffer in component:
            buffer[:] = 0
    session = pair.dial()
    wait_until(lambda: session.up or session.failure, "session up", LIMIT_S)
    if session.failure:
        return "no session", 0, 0
    try:
        item = pair.receiver.expect(session, room, theirs, 0)
    except PeerGoneError:
        return "no session", 0, 0
    transfer = pair.sender.transfer(room)
    wait_until(lambda: transfer.expected or not item.transfer.live, "decode asked or gave up", LIMIT_S)
    with transfer.lock:
        transfer.start(len(ours[PAGES]))
    if rng.random() < 0.1:
        pair.sender.send(transfer, PAGES, 0, ours[PAGES][:5])
        pair.receiver.abort(item, "chaos: the client has gone")
    elif transfer.expected is not None:
        pair.send_all(transfer, ours)
    wait_until(lambda: not item.transfer.live, f"end at decode of room {room}", LIMIT_S)
    if item.transfer.state is State.FAILED and transfer.expected is None:
        pair.sender.abort(transfer, "decode has failed")  # as the router does
    wait_until(lambda: not transfer.live, f"end at prefill of room {room}: {item.transfer.reason}", LIMIT_S)
    if item.transfer.state is State.DONE:
        assert_moved(pair.source, ours, pair.target, theirs)
    else:
        assert item.transfer.reason
    for component, buffers in enumerate(pair.target.arrays):
        rest = np.setdiff1d(np.arange(len(buffers[0])), theirs[component])
        assert not any(buffer[rest].any() for buffer in buffers), "a byte outside of what was reserved"
    if transfer.state is State.FAILED:
        assert transfer.reason
    counts = transfer.resent_chunks, item.transfer.corrupt_chunks
    pair.sender.release(transfer)
    pair.receiver.release(item)
    return item.transfer.state.value, *counts
