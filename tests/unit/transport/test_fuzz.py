"""Chunks, receipts and control messages that are wrong in every way: refused as such, and nothing written outside.

PRFAAS_FUZZ: how many in all (default 1,000,000); PRFAAS_FUZZ_SEED: which.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.errors import ChecksumError, PeerError, ProtocolError
from sglang_prfaas.sglang_plugin.ranks import find_ranks
from sglang_prfaas.transport.codec.base import Codec
from sglang_prfaas.transport.codec.session import SessionCodec, obstacle
from sglang_prfaas.transport.directory import RankTable
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
from sglang_prfaas.transport.handshake import refusal
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.layout import Component, Sharding
from sglang_prfaas.transport.mailbox import Mailbox, seal, unseal
from sglang_prfaas.transport.messages import (
    PROTOCOL_VERSION,
    Abort,
    Bye,
    Deregister,
    Directory,
    Done,
    Expect,
    Failed,
    Hello,
    InnerRail,
    Lookup,
    Message,
    Ping,
    RankInfo,
    Redial,
    Refuse,
    Register,
    Registered,
    Unknown,
    Welcome,
    decode_from_directory,
    decode_to_decode,
    decode_to_directory,
    decode_to_prefill,
    encode,
)
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.paging import MAX_PAGE_TOKENS
from sglang_prfaas.transport.part_memory import PrefillRank, decode_view, prefill_view
from sglang_prfaas.transport.receive_lane import Placement, ReceiveLane
from sglang_prfaas.transport.reshape import MAX_WIDTH_RATIO
from sglang_prfaas.transport.vector import why_not_native
from tests.transport.rig import PAGES, Memory, flat, layout, some_slots
from tests.unit.transport.socket_end import SocketEnd

COUNT = int(os.environ.get("PRFAAS_FUZZ", "1000000"))
CHUNKS, ENCODED_CHUNKS, MESSAGES, RECEIPTS, PREFACES = (COUNT * share // 20 for share in (8, 2, 2, 1, 1))
"""Messages are for four readers."""
SEED = int(os.environ.get("PRFAAS_FUZZ_SEED", "3"))
CHUNK_BYTES = 32 << 10
RANK = layout(
    components=(
        Component("kv", (1024, 4096), (Sharding(2),)),
        Component("mamba", (9000,), (Sharding(1),)),
        Component("aux", (64, 8), (Sharding(2),)),
    )
)
"""One that works with others of other widths and page sizes."""
MEMORY = Memory(RANK, None)
NATIVE_SHARE = 0.2
"""Of the transfers, whose bytes come through a socket."""
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


def some_chunk(rng: random.Random, of: IncomingTransfer, codec: SessionCodec) -> bytes:
    """A well-formed chunk of any place, in bounds or not, encoded where there is a codec, or a renewal."""
    if rng.random() < 0.002:
        return RENEWAL
    encoder = codec.of(PAGES, 1)
    if encoder is not None and rng.random() < 0.8:
        return some_encoded_chunk(rng, of, encoder)
    component, buffer = rng.randrange(4), rng.randrange(4)
    length = rng.choice((1, 64, 300, 1000, 5000, rng.randrange(1, CHUNK_BYTES + 100)))
    offset = rng.choice((0, length * rng.randrange(30), rng.randrange(130_000), (1 << 64) - length))
    transfer_id = rng.choice((of.transfer_id, of.transfer_id, of.transfer_id, 0, rng.getrandbits(63)))
    payload = b"\xff" * length
    return pack_chunk(ChunkHeader(transfer_id, component, buffer, offset, length), payload)


def some_encoded_chunk(rng: random.Random, of: IncomingTransfer, codec: Codec) -> bytes:
    """Items that were encoded, at any place and as any number; some are cut, or noise."""
    items = rng.choice((1, 1, 2, 6))
    payload = codec.encode(np.full((items, codec.item_bytes), rng.randrange(256), np.uint8))
    assert payload is not None
    data = payload.tobytes()
    if rng.random() < 0.3:
        data = rng.choice((data[: rng.randrange(1, len(data) + 1)], rng.randbytes(rng.randrange(1, CHUNK_BYTES))))
    items = rng.choice((items, items, items, 0, 1, 7, (1 << 32) - 1))
    first = rng.choice((0, rng.randrange(30), (1 << 32) - 1))
    transfer_id = rng.choice((of.transfer_id, of.transfer_id, rng.getrandbits(63)))
    buffer = rng.choice((1, 1, 1, 0, 3))
    return pack_chunk(ChunkHeader(transfer_id, PAGES, buffer, first, len(data), items), data)


Pair = tuple[socket.socket, socket.socket]


class Coming:
    """Gives any number of bytes at a time, through a socket where there is one."""

    def __init__(self, data: bytes, rng: random.Random, pair: Pair | None) -> None:
        self.rest = memoryview(data)
        self._rng = rng
        self._pair = pair
        self._on_way = 0
        """Bytes of `rest` that the socket has."""

    def receive(self, views: list[memoryview]) -> int | None:
        assert sum(map(len, views)) > 0, "nothing to receive into: a connection would spin"
        if self._pair is not None:
            return self._through(SocketEnd(self._pair[1]), lambda end: end.receive(views))
        count = left = min(sum(map(len, views)), len(self.rest), self._some())
        for view in views:
            part = min(left, len(view))
            view[:part] = self.rest[:part]
            self.rest, left = self.rest[part:], left - part
            if not left:
                break
        return count or None

    def receive_with(self, act: Callable[[int], int | None]) -> int | None:
        assert self._pair is not None, "there is no descriptor"
        return self._through(SocketEnd(self._pair[1]), lambda end: end.receive_with(act))

    def _through(self, end: SocketEnd, receive: Callable[[SocketEnd], int | None]) -> int | None:
        assert self._pair is not None
        self._on_way += self._pair[0].send(self.rest[self._on_way :][: self._some()])
        count = receive(end)
        assert count != 0
        self.rest, self._on_way = self.rest[count or 0 :], self._on_way - (count or 0)
        return count

    def _some(self) -> int:
        return self._rng.choice((0, 1, 39, 40, 1 << 20))


def feed(lane: ReceiveLane, data: bytes, rng: random.Random, pair: Pair | None = None) -> None:
    """As a connection does. Raises PeerError."""
    coming = Coming(data, rng, pair)
    while coming.rest and not lane.renewed:
        before, count = len(coming.rest), lane.fill(coming)
        assert (count or 0) == before - len(coming.rest)
        lane.answers(idle=rng.random() < 0.5)


def hang_up(pair: Pair | None) -> None:
    for sock in pair or ():
        sock.close()


@pytest.mark.parametrize(("codec_name", "count"), [("raw", CHUNKS), ("shuffle", ENCODED_CHUNKS)])
def test_chunks(codec_name: str, count: int) -> None:
    rng = random.Random(SEED)
    of = layout()
    codec = SessionCodec(codec_name, of)
    clock = MonotonicClock()
    done = refused = 0
    while done < count:
        memory = Memory(of, None)
        slots = some_slots(rng.randrange(1 << 30))
        transfer = IncomingTransfer(1, rng.randrange(1, 1 << 40), of, tuple(map(len, slots)), clock)
        item = Placement(transfer, tuple(slots))
        found = {transfer.transfer_id: item}
        lane: ReceiveLane | None = None
        native = not why_not_native and rng.random() < NATIVE_SHARE
        pair: Pair | None = None
        for _ in range(CHUNKS_OF_A_TRANSFER):
            done += 1
            if lane is None:
                lane = ReceiveLane(memory.rank, CHUNK_BYTES, found.get, lambda _: None, codec, native=native)
                pair = socket.socketpair() if native else None
            try:
                feed(lane, mangled(some_chunk(rng, transfer, codec), rng), rng, pair)
                ended = lane.renewed
            except (ProtocolError, ChecksumError):
                refused += 1
                ended = True
            if ended:
                lane.lost()
                lane = None
                hang_up(pair)
        if lane is not None:
            lane.lost()
            hang_up(pair)
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
    for _ in range(RECEIPTS):
        try:
            reader.feed(mangled(Receipt(rng.getrandbits(64), rng.random() < 0.3).pack(), rng))
        except ChecksumError:
            refused += 1
            reader = ReceiptReader()
    assert refused


def distorted(value: Any, rng: random.Random) -> Any:
    """A message's fields with another value somewhere among them: well-formed, but for what it says."""
    if isinstance(value, (list, tuple, dict)) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        chosen = rng.choice(keys)
        items = value.items() if isinstance(value, dict) else enumerate(value)
        changed = {key: distorted(item, rng) if key == chosen else item for key, item in items}
        return changed if isinstance(value, dict) else list(changed.values())
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.7:
        power = 1 << rng.randrange(1, 63)
        return rng.choice((0, -1, 1, value + 1, value * 2, power, -power, min(value * power, (1 << 64) - 1)))
    return rng.choice((None, True, 0, 1 << 62, "", "x" * 5000, "\x00", b"", bytes(16), [], [[]], {}, 1.5))


def some_messages(rng: random.Random) -> Iterator[bytes]:
    """Messages of every kind, without end."""
    instance = bytes(16)
    rank = RankInfo(0, 0, 0, "10.0.0.1", 4711, InnerRail("mooncake", "pd", "10.0.0.1", 4713))
    known: list[Message] = [
        Hello(PROTOCOL_VERSION, "pd", "decode-0", RANK, 4, 1 << 20, instance, 0, ("fp8",), 16),
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
        Register(rank, "boot", 1, 1, 1, False, 16),
        Deregister(rank, "boot"),
        Lookup(),
        Registered(),
        Directory(True, 1, 1, 1, True, (rank,), 16),
    ]
    known += [message for message in known if isinstance(message, (Hello, Directory))] * 8  # they have most to say
    bodies = [encode(message) for message in known]
    fields = [msgspec.msgpack.decode(body) for body in bodies]
    while True:
        chosen = rng.randrange(len(bodies))
        yield bodies[chosen] if rng.random() < 0.5 else msgspec.msgpack.encode(distorted(fields[chosen], rng))


def believe(message: Any) -> None:
    """What the other end does with what it was told, before it knows better."""
    if isinstance(message, Hello):
        if not refusal(RANK, message, sessions=0, connections=0):
            view = prefill_view(RANK, MEMORY.rank, message.layout)
            assert view.shares <= MAX_WIDTH_RATIO, "transfers of a request"
            assert view.peer_page_tokens <= MAX_PAGE_TOKENS, "units that a page is filled up with"
            obstacle("fp8", view.layout, message.codecs, message.chunk_bytes)
    elif isinstance(message, Expect):
        OutgoingTransfer(message.room, MonotonicClock()).expect(message)
    elif isinstance(message, Register):
        table = RankTable()
        table.register(message)
        table.directory()
    elif isinstance(message, Directory) and message.complete:
        for dp_rank in (0, 7):
            found = find_ranks(message, 7, dp_rank, 0, 1)
            for rank in () if isinstance(found, str) else found:
                decode_view(RANK, MEMORY.rank, PrefillRank(message.tp_size, rank.tp_rank, message.page_tokens))


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
    for _ in range(MESSAGES):
        number = rng.choice((0, 0, 1, 2, rng.getrandbits(64)))
        data = mangled(seal(mangled(next(bodies), rng), number, rng.choice((0, 0, 0, 1, rng.getrandbits(64)))), rng)
        try:
            got, acknowledged, body = unseal(data)
            mailbox.accept(got, acknowledged, 0.0)
            believe(decode(body))
        except PeerError:
            refused += 1
    assert 0 < refused < MESSAGES


def test_prefaces() -> None:
    rng = random.Random(SEED)
    starts = (PREFACE_MAGIC + DATA_VERSION.to_bytes(2, "big"), PREFACE_MAGIC + bytes(2), bytes(6))
    for _ in range(PREFACES):
        start = rng.choice(starts)
        data = start + rng.randbytes(PREFACE.size - len(start))
        try:
            preface = unpack_preface(data)
        except ProtocolError:
            assert start != starts[0]
            continue
        assert preface.pack() == data
