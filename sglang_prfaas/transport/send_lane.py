"""The bytes of a prefill rank's data connection, without its socket: which to send next, and whose they are."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec
import numpy as np

from sglang_prfaas.transport.codec.session import SessionCodec
from sglang_prfaas.transport.device_memory import TorchBuffer
from sglang_prfaas.transport.framing import (
    HEADER_BYTES,
    TRAILER_BYTES,
    ChunkHeader,
    PayloadCheck,
    pack_chunk,
    pack_header,
)
from sglang_prfaas.transport.memory import Bytes, RankMemory
from sglang_prfaas.transport.outbox import Task
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.views import cut, split

logger = logging.getLogger(__name__)

MAX_PARTS = 512
"""Separate pieces of memory in one call; the kernel takes 1024."""
PIECE_BYTES = 1 << 20
"""Summed up and handed over at a time: so much stays in a core's cache in between."""
SLACK_BYTES = 4 << 10
"""Headers and trailers that may go with a piece."""
MIN_LENT_BYTES = 64 << 10
"""Chunks below this are copied: that costs less than the calls for handing their pages over."""


class Sink(Protocol):
    """Takes bytes and never waits: a connection."""

    lends: bool
    """Whether it has `lend`."""

    def send(self, views: list[memoryview], *, more: bool = False) -> int:
        """Take bytes; returns how many, 0 where it would have to wait."""

    def lend(self, views: list[memoryview]) -> int:
        """As `send`, without a copy: they are read until the peer has them."""


class SendLane:
    """A batch of chunks on its way, straight from the pages where they can be sent from there.

    Add chunks, then `push` until that returns True. A chunk's checksum is made piece by piece, as it leaves. Should a
    transfer end in the meantime, zeros take the place of its bytes: the peer knows already, or finds the checksum
    wrong. Where items moved, and something else may have been written to their old slots before they left, the
    checksum is made wrong, and the chunk is sent again from the new ones."""

    def __init__(
        self,
        memory: RankMemory,
        chunk_bytes: int,
        failed: Callable[[OutgoingTransfer, str], None],
        codec: SessionCodec | None = None,
    ) -> None:
        self._memory = memory
        self._chunk_bytes = chunk_bytes
        self._failed = failed
        self._codec = codec or SessionCodec()
        self._staging: Bytes | None = None
        self._staged = 0
        self._raw: Bytes | None = None
        self._runs: deque[_Run] = deque()
        """What has yet to leave."""
        self._parts = 0
        """Pieces of memory that the batch was made of."""
        self._pinned: list[OutgoingTransfer] = []
        self.batch_bytes = 0
        """Payload of the batch."""

    def reset(self) -> None:
        """Begin a new batch."""
        self._runs.clear()
        self._parts = 0
        self._staged = self.batch_bytes = 0

    @property
    def full(self) -> bool:
        """Whether the batch is large enough."""
        return self.batch_bytes >= self._chunk_bytes or self._parts >= MAX_PARTS

    def add(self, task: Task, *, copy: bool = False) -> bool:
        """Put a chunk into the batch, where it is small a `copy`: that costs less than looking after its pages. Returns
        False where its transfer has ended, or ends with this: its memory could not be read."""
        transfer, span, expected = task.transfer, task.span, task.transfer.expected
        if expected is None or not transfer.live:
            return False
        try:
            task.ready()
            if not transfer.pin():
                return False
            try:
                plain = ChunkHeader(expected.transfer_id, span.component, span.buffer, span.offset, span.length)
                moves = -1
                while moves != transfer.moves:  # what a move left may be written over while it is read
                    moves = transfer.moves
                    header, views, owner = self._encoded(task, plain) or (plain, *self._payload(task))
                    runs = _runs(header, views, owner, moves, copy=copy)
            finally:
                transfer.unpin()
        except Exception as error:
            logger.exception("prfaas: a chunk of room %d could not be read", transfer.room)
            self._failed(transfer, f"prefill could not read a chunk: {error}")
            return False
        self._runs.extend(runs)
        self._parts += len(runs) + len(views)
        self.batch_bytes += header.length
        task.wire_bytes = header.length
        return True

    def _encoded(self, task: Task, header: ChunkHeader) -> tuple[ChunkHeader, list[memoryview], None] | None:
        """A chunk's items encoded, with the header that says so, as `_payload`; None where its bytes are sent as they
        are."""
        span = task.span
        codec = self._codec.of(span.component, span.buffer)
        if codec is None or span.offset % codec.item_bytes or span.length % codec.item_bytes:
            return None
        buffer = self._memory.components[span.component][span.buffer]
        if isinstance(buffer, TorchBuffer):
            raw = buffer.rows(task.indices, task.first_item, span.offset, span.length)
        else:
            if self._raw is None:
                self._raw = np.empty(self._chunk_bytes, np.uint8)
            raw = self._raw[: span.length]
            buffer.gather(task.indices, task.first_item, span.offset, raw)
            raw = raw.reshape(-1, codec.item_bytes)
        payload = codec.encode(raw)
        if payload is None:
            return None
        first_item, items = span.offset // codec.item_bytes, span.length // codec.item_bytes
        encoded = msgspec.structs.replace(header, offset=first_item, items=items, length=len(payload))
        return encoded, [payload.data], None

    def _payload(self, task: Task) -> tuple[list[memoryview], OutgoingTransfer | None]:
        """A chunk's bytes, and the transfer whose pages they lie in: None for a copy."""
        span = task.span
        buffer = self._memory.components[span.component][span.buffer]
        views = buffer.views(task.indices, task.first_item, span.offset, span.length)
        if views:
            return views, task.transfer
        if self._staging is None or self._staged + span.length > len(self._staging):
            self._staging, self._staged = self._memory.staging(2 * self._chunk_bytes), 0
        out = self._staging[self._staged : self._staged + span.length]
        buffer.gather(task.indices, task.first_item, span.offset, out)
        self._staged += span.length
        return [out.data], None

    @property
    def empty(self) -> bool:
        """Whether all of the batch has left."""
        return not self._runs

    def push(self, sink: Sink) -> bool:
        """Hand over what the sink takes now. Returns whether all of the batch has left. Raises as the sink does."""
        try:
            while self._runs:
                views, lendable, more = self._next(lend=sink.lends)
                sent = sink.lend(views) if lendable else sink.send(views, more=more)
                if not sent:
                    return False
                self._advance(sent)
            return True
        finally:
            for owner in self._pinned:
                owner.unpin()
            self._pinned.clear()

    def _next(self, *, lend: bool) -> tuple[list[memoryview], bool, bool]:
        """What is to leave next, whether it may be lent, and whether there is more after it."""
        found: list[memoryview] = []
        room_bytes = PIECE_BYTES + SLACK_BYTES
        lent = lend and self._runs[0].lendable
        for run in self._runs:
            if found:
                full = run.nbytes > room_bytes or len(found) + len(run.views) > MAX_PARTS
                if full or (lend and run.lendable is not lent):
                    return found, lent, True
            if run.total is not None and not self._ready(run, run.total):
                if found and lent:
                    return found, True, True
                lent = False
            found += run.views
            room_bytes -= run.nbytes
        return found, lent, False

    def _ready(self, run: _Run, total: _Sum) -> bool:
        """Make sure that a run's bytes can be read until `push` returns, and are part of the checksum. Returns False
        where they cannot: its transfer has ended, and zeros take their place."""
        owner = total.owner
        if owner is not None and run.views and owner not in self._pinned:
            if not owner.pin():
                total.spoilt = True
                run.blank()
                return False
            self._pinned.append(owner)
        if not run.summed:
            run.summed = True
            if run.views:
                total.check.update(run.views)
            else:
                run.views = [memoryview(total.trailer())]
        return True

    def _advance(self, sent: int) -> None:
        """So many bytes have left."""
        runs = self._runs
        while runs and sent >= runs[0].nbytes:
            sent -= runs.popleft().nbytes
        if sent:
            runs[0].drop(sent)


class _Sum:
    """The checksum of a chunk that is being sent."""

    __slots__ = ("check", "moves", "owner", "spoilt")

    def __init__(self, check: PayloadCheck, owner: OutgoingTransfer | None, moves: int) -> None:
        """owner: the transfer whose pages the chunk lies in, None for a copy; moves: how often its items had moved when
        the chunk was looked up."""
        self.check = check
        self.owner = owner
        self.moves = moves
        self.spoilt = False

    def trailer(self) -> bytes:
        """What comes after the payload, all of which has been taken."""
        moved = self.owner is not None and self.owner.moves != self.moves
        return self.check.trailer(spoilt=self.spoilt or moved)


class _Run:
    """Bytes of a batch that belong together: at most a piece of a chunk."""

    __slots__ = ("lendable", "nbytes", "summed", "total", "views")

    def __init__(
        self, views: list[memoryview], nbytes: int, total: _Sum | None = None, *, lendable: bool = False
    ) -> None:
        """views: none for the trailer of the chunk with the checksum `total`; total: None where these bytes are not
        part of one. lendable: whether they stay as they are until the peer has them, unless the transfer ends."""
        self.views = views
        self.nbytes = nbytes
        self.total = total
        self.lendable = lendable
        self.summed = False

    def drop(self, sent: int) -> None:
        """Fewer than all of its bytes have left."""
        self.nbytes -= sent
        self.views = split(self.views, sent)[1]

    def blank(self) -> None:
        """Zeros from here on."""
        self.views = [memoryview(bytes(self.nbytes))]
        self.total, self.lendable = None, False


def _runs(
    header: ChunkHeader, views: list[memoryview], owner: OutgoingTransfer | None, moves: int, *, copy: bool
) -> list[_Run]:
    """A chunk, as pieces; see `_Sum`. copy: in one, with a copy of its bytes."""
    small = header.length < MIN_LENT_BYTES
    if copy or (small and owner is None):
        chunk = pack_chunk(header, *views)
        return [_Run([memoryview(chunk)], len(chunk))]
    head = pack_header(header)
    total, lendable = _Sum(PayloadCheck(head), owner, moves), not small and owner is not None
    return [
        _Run([memoryview(head)], HEADER_BYTES),
        *(_Run(piece, nbytes, total, lendable=lendable) for piece, nbytes in cut(views, PIECE_BYTES)),
        _Run([], TRAILER_BYTES, total),
    ]
