"""Chunks, receipts and control messages that are wrong in every way: refused as such, and nothing written outside.

PRFAAS_FUZZ: how many of each (default 10,000); PRFAAS_FUZZ_SEED: which.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.errors import ChecksumError, PeerError, ProtocolError
from sglang_prfaas.transport.framing import (
    DATA_VERSION,
    PREFACE,
    PREFACE_MAGIC,
    RENEWAL,
    ChunkHeader,
    Receipt,
    ReceiptReader,
    pack_chunk,
    unpack_preface,
)
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.mailbox import Mailbox, seal, unseal
from sglang_prfaas.transport.messages import (
    PROTOCOL_VERSION,
    Abort,
    Bye,
    Done,
    Expect,
    Failed,
    Hello,
    Message,
    Ping,
    Redial,
    Refuse,
    Unknown,
    Welcome,
    decode_from_directory,
    decode_to_decode,
    decode_to_directory,
    decode_to_prefill,
    encode,
)
from sglang_prfaas.transport.receive_lane import Placement, ReceiveLane
from tests.transport.rig import Memory, flat, layout, some_slots

COUNT = int(os.environ.get("PRFAAS_FUZZ", "10000"))
SEED = int(os.environ.get("PRFAAS_FUZZ_SEED", "3"))
CHUNK_BYTES = 8192
CHUNKS_OF_A_TRANSFER = 200


def mangled(data: bytes, rng: random.Random) -> bytes:
    """With bits flipped, bytes cut out or put in, or the end gone; often as it was."""
    kind = rng.randrange(8)
    at = rng.randrange(len(data))
    if kind == 0:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if kind == 3:
        return rng.randbytes(rng.randrange(1, 200))
    return data


def some_chunk(rng: random.Random, of: IncomingTransfer) -> bytes:
    """A well-formed chunk of any place, in bounds or not, or a renewal."""
    if rng.random() < 0.002:
        return RENEWAL
    component, buffer = rng.randrange(4), rng.randrange(4)
    length = rng.choice((1, 64, 300, 1000, 5000, rng.randrange(1, CHUNK_BYTES + 100)))
    offset = rng.choice((0, length * rng.randrange(30), rng.randrange(130_000), (1 << 64) - length))
    transfer_id = rng.choice((of.transfer_id, of.transfer_id, of.transfer_id, 0, rng.getrandbits(63)))
    payload = b"\xff" * length
    return pack_chunk(ChunkHeader(transfer_id, component, buffer, offset, length), payload)


def feed(lane: ReceiveLane, data: bytes, rng: random.Random) -> None:
    """As a connection does: any number of bytes at a time. Raises PeerError."""
    rest = memoryview(data)

    def receive(views: list[memoryview]) -> int | None:
        nonlocal rest
        assert sum(map(len, views)) > 0, "nothing to receive into: a connection would spin"
        count = left = min(sum(map(len, views)), len(rest), rng.choice((0, 1, 39, 40, 1 << 20)))
        for view in views:
            part = min(left, len(view))
            view[:part] = rest[:part]
            rest, left = rest[part:], left - part
            if not left:
                break
        return count or None

    while rest and not lane.renewed:
        before, count = len(rest), lane.fill(receive)
        assert (count or 0) == before - len(rest)
        lane.answers(idle=rng.random() < 0.5)


def test_chunks() -> None:
    rng = random.Random(SEED)
    of = layout()
    clock = MonotonicClock()
    done = refused = 0
    while done < COUNT:
        memory = Memory(of, None)
        slots = some_slots(rng.randrange(1 << 30))
        transfer = IncomingTransfer(1, rng.randrange(1, 1 << 40), of, tuple(map(len, slots)), clock)
        item = Placement(transfer, tuple(slots))
        found = {transfer.transfer_id: item}
        lane: ReceiveLane | None = None
        for _ in range(CHUNKS_OF_A_TRANSFER):
            done += 1
            if lane is None:
                lane = ReceiveLane(memory.rank, CHUNK_BYTES, found.get, lambda _: None)
            try:
                feed(lane, mangled(some_chunk(rng, transfer), rng), rng)
                ended = lane.renewed
            except (ProtocolError, ChecksumError):
                refused += 1
                ended = True
            if ended:
                lane.lost()
                lane = None
        if lane is not None:
            lane.lost()
        with transfer.lock:
            transfer.fail("enough")  # hangs where a pin was forgotten
        for buffer, taken in zip(
            flat(memory.arrays), [s for s, c in zip(slots, memory.arrays, strict=True) for _ in c], strict=True
        ):
            assert not buffer[np.setdiff1d(np.arange(len(buffer)), taken)].any(), "a byte outside of what was reserved"
    assert 0.05 < refused / done < 0.95


def test_receipts() -> None:
    rng = random.Random(SEED)
    reader, refused = ReceiptReader(), 0
    for _ in range(COUNT):
        try:
            reader.feed(mangled(Receipt(rng.getrandbits(64), rng.random() < 0.3).pack(), rng))
        except ChecksumError:
            refused += 1
            reader = ReceiptReader()
    assert refused


def some_messages(rng: random.Random) -> Iterator[bytes]:
    """Messages of every kind, without end."""
    instance = bytes(16)
    known: list[Message] = [
        Hello(PROTOCOL_VERSION, "pd", "decode-0", layout(), 4, 1 << 20, instance, 0),
        Expect(1, 7, (20, 2, 1), 0),
        Done(1, 7),
        Abort(7, "gone", 1),
        Bye("stopping"),
        Ping(),
        Welcome(instance, 4711, instance),
        Refuse("no"),
        Failed(1, 7, "no"),
        Unknown(instance),
        Redial(3),
    ]
    bodies = [encode(message) for message in known]
    while True:
        yield rng.choice(bodies)


@pytest.mark.parametrize(
    "decode",
    [decode_to_prefill, decode_to_decode, decode_to_directory, decode_from_directory],
    ids=["to prefill", "to decode", "to directory", "from directory"],
)
def test_messages(decode: Callable[[bytes], object]) -> None:
    rng = random.Random(SEED)
    mailbox = Mailbox(0.0)
    bodies = some_messages(rng)
    refused = 0
    for _ in range(COUNT):
        number = rng.choice((0, 0, 1, 2, rng.getrandbits(64)))
        data = mangled(seal(mangled(next(bodies), rng), number, rng.choice((0, 0, 0, 1, rng.getrandbits(64)))), rng)
        try:
            got, acknowledged, body = unseal(data)
            mailbox.accept(got, acknowledged, 0.0)
            decode(body)
        except PeerError:
            refused += 1
    assert 0 < refused <= COUNT


def test_prefaces() -> None:
    rng = random.Random(SEED)
    starts = (PREFACE_MAGIC + DATA_VERSION.to_bytes(2, "big"), PREFACE_MAGIC + bytes(2), bytes(6))
    for _ in range(COUNT):
        start = rng.choice(starts)
        data = start + rng.randbytes(PREFACE.size - len(start))
        try:
            preface = unpack_preface(data)
        except ProtocolError:
            assert start != starts[0]
            continue
        assert preface.pack() == data
