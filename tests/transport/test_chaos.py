"""Transfers over links that reset, cut, stall and corrupt, and with peers that are replaced or killed: every one is
complete and equal, or has failed with a reason on both sides. PRFAAS_CHAOS: how many (default 60; the bar is 1000);
PRFAAS_CHAOS_SEED: which."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from msgspec import Struct

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import PeerGoneError
from sglang_prfaas.transport.receive_mover import Incoming, ReceiveMover
from sglang_prfaas.transport.transfer import State
from tests.transport.keyring import Keyring
from tests.transport.relay import FaultyRelay
from tests.transport.rig import CONFIG, PAGES, SLOTS, Pair, Slots, assert_moved, some_slots, wait_ended, wait_until
from tests.transport.test_processes import peer

TRANSFERS = int(os.environ.get("PRFAAS_CHAOS", "60"))
SEED = int(os.environ.get("PRFAAS_CHAOS_SEED", "7"))
LIMIT_S = 60.0
"""No transfer may take longer; most take milliseconds."""
RESTART_EVERY = 25
KILL_EVERY = 30
MOST_AT_ONCE = 3

COUNTS = (20, 2, 1)
"""Items of a request."""

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


class Request(Struct):
    """One of several that go at once: `ours` to `theirs`, slots of prefill and of decode."""

    room: int
    ours: Slots
    theirs: Slots
    item: Incoming


def requests_at_once(rooms: range, rng: random.Random) -> list[tuple[int, Slots, Slots]]:
    """Rooms, each with slots at either end; none shares one with another at the decode end."""
    orders = [np.random.default_rng(rng.randrange(1 << 30)).permutation(slots) for slots in SLOTS]
    found = []
    for place, room in enumerate(rooms):
        theirs = [order[place * n : place * n + n].astype(np.int64) for order, n in zip(orders, COUNTS, strict=True)]
        found.append((room, some_slots(rng.randrange(1 << 30)), theirs))
    return found


def check_decode(pair: Pair, requests: Sequence[Request]) -> None:
    """What is done is equal, what has failed says why, and nothing else was written."""
    for request in requests:
        if request.item.transfer.state is State.DONE:
            assert_moved(pair.source, request.ours, pair.target, request.theirs)
        else:
            assert request.item.transfer.reason
    for component, buffers in enumerate(pair.target.arrays):
        taken = np.concatenate([request.theirs[component] for request in requests] or [np.array([], np.int64)])
        rest = np.setdiff1d(np.arange(len(buffers[0])), taken)
        assert not any(buffer[rest].any() for buffer in buffers), "a byte outside of what was reserved"


def clear(pair: Pair) -> None:
    for component in pair.target.arrays:
        for buffer in component:
            buffer[:] = 0


@pytest.mark.usefixtures("sending")
def test_chaos() -> None:
    rage(CHAOS, CHAOS)


def test_chaos_with_keys(keyring: Keyring) -> None:
    """A flipped bit ends a connection here: it is no record any more, or no handshake."""
    rage(keyring.config("prfaas", CHAOS), keyring.config("pd", CHAOS))


def rage(config: TransportConfig, decode_config: TransportConfig) -> None:
    """As many transfers as asked for, between ends with these settings."""
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    with Pair(config=config, decode_config=decode_config) as pair:
        control, data = FaultyRelay(pair.sender.control_port, SEED), FaultyRelay(pair.sender.data_port, SEED + 1)
        data.corrupt_rate = 0.05
        real_port, pair.sender.control_port = pair.sender.control_port, control.port
        pair.sender._handshake.data_port = data.port
        try:
            with Faults(control, data, random.Random(SEED + 2)) as faults:
                room = 0
                while room < TRANSFERS:
                    rooms = range(room, min(TRANSFERS, room + rng.randint(1, MOST_AT_ONCE)))
                    if rooms.start // RESTART_EVERY != rooms.stop // RESTART_EVERY:
                        pair.receiver.close("chaos: a decode process ends")
                        pair.receiver = ReceiveMover(
                            pair.layout, pair.target.rank, decode_config, MonotonicClock(), site="pd", server="decode-0"
                        )
                        pair.receiver.start()
                    outcomes += at_once(pair, rooms, rng)
                    room = rooms.stop
        finally:
            control.close()
            data.close()
            pair.sender.control_port = real_port
        assert pair.sender._table.transfers() == []
    print(f"{dict(outcomes)}, faults {faults.done}, {data.corrupted} bits flipped")
    assert sum(outcomes[name] for name in ("done", "failed", "no session")) == TRANSFERS
    assert outcomes["done"] > TRANSFERS * 0.5, outcomes


def at_once(pair: Pair, rooms: range, rng: random.Random) -> Counter[str]:
    """Several transfers, of which nothing but themselves may be found in decode's memory. Returns how they ended, and
    the chunks that were resent and corrupt."""
    clear(pair)
    session = pair.dial()
    wait_until(lambda: session.up or session.failure, "session up", LIMIT_S)
    requests = []
    try:
        for room, ours, theirs in requests_at_once(rooms, rng):
            requests.append(Request(room, ours, theirs, pair.receiver.expect(session, room, theirs, 0)))
    except PeerGoneError:
        pass  # those that were asked for have failed
    transfers = [pair.sender.transfer(request.room) for request in requests]
    pairs = list(zip(requests, transfers, strict=True))
    for request, transfer in pairs:
        wait_until(lambda r=request, t=transfer: t.expected or not r.item.transfer.live, "decode asked", LIMIT_S)
        with transfer.lock:
            transfer.start(len(request.ours[PAGES]))
    for request, transfer in rng.sample(pairs, len(pairs)):
        if rng.random() < 0.1:
            pair.sender.send(transfer, PAGES, 0, request.ours[PAGES][:5])
            pair.receiver.abort(request.item, "chaos: the client has gone")
        elif transfer.expected is not None:
            pair.send_all(transfer, request.ours)
    found: Counter[str] = Counter({"no session": len(rooms) - len(requests)})
    for request, transfer in pairs:
        item = request.item
        wait_until(lambda i=item: not i.transfer.live, f"end at decode of room {request.room}", LIMIT_S)
        if item.transfer.state is State.FAILED and transfer.expected is None:
            pair.sender.abort(transfer, "decode has failed")  # as the router does
        wait_until(lambda t=transfer: not t.live, f"end at prefill of room {request.room}", LIMIT_S)
        assert transfer.state is State.DONE or transfer.reason
        found[item.transfer.state.value] += 1
        found["resent chunks"] += transfer.resent_chunks
        found["corrupt chunks"] += item.transfer.corrupt_chunks
    check_decode(pair, requests)
    for request, transfer in pairs:
        pair.sender.release(transfer)
        pair.receiver.release(request.item)
    return found


def test_prefill_processes_that_are_killed() -> None:
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    with Pair() as pair:
        for kill in range(max(1, TRANSFERS // KILL_EVERY)):
            clear(pair)
            with peer("prefill") as prefill:
                pair.sender.control_port = int(prefill.line()[1])
                session = pair.session()
                requests = []
                for room, _, theirs in requests_at_once(range(3 * kill, 3 * kill + 3), rng):
                    item = pair.receiver.expect(session, room, theirs, 0)
                    requests.append(Request(room, some_slots(room), theirs, item))  # the slots that it sends
                    prefill.say("half", room)
                    prefill.say("rest", room)
                threading.Event().wait(rng.uniform(0.0, 0.1))
                prefill.process.kill()
                for request in requests:
                    wait_ended(request.item.transfer)
                    outcomes[request.item.transfer.state.value] += 1
                check_decode(pair, requests)
                for request in requests:
                    pair.receiver.release(request.item)
    print(f"prefill killed: {dict(outcomes)}")


def test_decode_processes_that_are_killed() -> None:
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    with Pair() as pair:
        for kill in range(max(1, TRANSFERS // KILL_EVERY)):
            with peer("decode", pair.sender.control_port) as decode:
                rooms = range(3 * kill, 3 * kill + 3)
                for room in rooms:
                    decode.say("expect", room)
                transfers = [pair.sender.transfer(room) for room in rooms]
                for room, transfer in zip(rooms, transfers, strict=True):
                    wait_until(lambda t=transfer: t.expected, "decode asked")
                    with transfer.lock:
                        transfer.start(COUNTS[PAGES])
                    pair.sender.send(transfer, PAGES, 0, some_slots(room)[PAGES][:10])
                threading.Event().wait(rng.uniform(0.0, 0.1))
                decode.process.kill()
                for room, transfer in zip(rooms, transfers, strict=True):
                    pair.sender.send(transfer, PAGES, 10, some_slots(room)[PAGES][10:])
                    wait_ended(transfer)
                    outcomes[transfer.state.value] += 1
                    assert transfer.reason.startswith("connection to decode pd/decode-0 lost: its process has ended")
                    pair.sender.release(transfer)
        assert pair.sender._table.transfers() == []
    print(f"decode killed: {dict(outcomes)}")
    assert set(outcomes) == {"failed"}
