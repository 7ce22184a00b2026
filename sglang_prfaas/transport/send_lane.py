"""The bytes of a prefill rank's data connection, without its socket: which to send next, and whose they are."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from sglang_prfaas.transport import vector
from sglang_prfaas.transport.codec.session import SessionCodec
from sglang_prfaas.transport.device_memory import TorchBuffer
from sglang_prfaas.transport.framing import (
    ChunkHeader,
    pack_chunk,
    pack_header,
    pack_trailer,
    payload_seed,
)
from sglang_prfaas.transport.memory import Bytes, RankMemory
from sglang_prfaas.transport.outbox import Task
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.vector import Sink, Vector

logger = logging.getLogger(__name__)

MAX_RUNS = 512
"""Of a batch, and in one call; the kernel takes 1024 places."""
JOINED_BYTES = 1 << 20
"""Of small chunks, handed over at a time."""
BEFORE_BYTES = 4 << 10
"""Headers and trailers that may go with a payload."""
SMALL_BYTES = 64 << 10
"""Copies below this leave in one piece, header and trailer included."""


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
        self._count = 0
        """How many runs the batch was made of."""
        self._pinned: list[OutgoingTransfer] = []
        self.batch_bytes = 0
        """Payload of the batch."""
        self.native = False
        """Whether the sink has `send_with`."""

    def reset(self) -> None:
        """Begin a new batch."""
        self._runs.clear()
        self._count = 0
        self._staged = self.batch_bytes = 0

    @property
    def full(self) -> bool:
        """Whether the batch is large enough."""
        return self.batch_bytes >= self._chunk_bytes or self._count >= MAX_RUNS

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
                    header, runs = self._runs_of(task, plain, moves, copy=copy)
            finally:
                transfer.unpin()
        except Exception as error:
            logger.exception("prfaas: a chunk of room %d could not be read", transfer.room)
            self._failed(transfer, f"prefill could not read a chunk: {error}")
            return False
        self._runs.extend(runs)
        self._count += len(runs)
        self.batch_bytes += header.length
        task.wire_bytes = header.length
        return True

    def _runs_of(self, task: Task, header: ChunkHeader, moves: int, *, copy: bool) -> tuple[ChunkHeader, list[_Run]]:
        """A chunk, and its header as it is sent. moves: how often its items have moved when this is called."""
        encoded = self._encoded(task, header)
        if encoded is not None:
            header, data = encoded
            return header, self._copied(header, data)
        span = task.span
        buffer = self._memory.components[span.component][span.buffer]
        place = task.indices, task.first_item, span.offset, span.length
        if copy:
            return header, [_Bytes(pack_chunk(header, *(buffer.views(*place) or [self._gathered(task)])))]
        head = pack_header(header)
        lying = vector.of_items(buffer, *place, payload_seed(head), native=self.native)
        if lying is None:
            return header, self._copied(header, self._gathered(task))
        payload = _Payload(lying, task.transfer, moves)
        return header, [_Bytes(head), payload, _Trailer(payload)]

    def _copied(self, header: ChunkHeader, data: memoryview) -> list[_Run]:
        """A chunk of bytes that nobody else writes to."""
        if header.length < SMALL_BYTES:
            return [_Bytes(pack_chunk(header, data))]
        head = pack_header(header)
        payload = _Payload(vector.of_bytes(data, payload_seed(head), native=self.native))
        return [_Bytes(head), payload, _Trailer(payload)]

    def _encoded(self, task: Task, header: ChunkHeader) -> tuple[ChunkHeader, memoryview] | None:
        """A chunk's items encoded, with the header that says so; None where its bytes are sent as they are."""
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
        return msgspec.structs.replace(header, offset=first_item, items=items, length=len(payload)), payload.data

    def _gathered(self, task: Task) -> memoryview:
        """A copy of a chunk's bytes."""
        span = task.span
        buffer = self._memory.components[span.component][span.buffer]
        if self._staging is None or self._staged + span.length > len(self._staging):
            self._staging, self._staged = self._memory.staging(2 * self._chunk_bytes), 0
        out = self._staging[self._staged : self._staged + span.length]
        buffer.gather(task.indices, task.first_item, span.offset, out)
        self._staged += span.length
        return out.data

    @property
    def empty(self) -> bool:
        """Whether all of the batch has left."""
        return not self._runs

    def push(self, sink: Sink) -> bool:
        """Hand over what the sink takes now. Returns whether all of the batch has left. Raises as the sink does."""
        try:
            while self._runs:
                views, payload, more = self._next()
                sent = sink.send(views, more=more) if payload is None else payload.vector.push(sink, views)
                if not sent:
                    return False
                self._advance(sent)
            return True
        finally:
            for owner in self._pinned:
                owner.unpin()
            self._pinned.clear()

    def _next(self) -> tuple[list[memoryview], _Payload | None, bool]:
        """What is to leave next: bytes, the payload after them, and whether there is more after that."""
        found: list[memoryview] = []
        nbytes = 0
        for at, run in enumerate(self._runs):
            if isinstance(run, _Payload):
                if nbytes > BEFORE_BYTES:
                    return found, None, True
                if self._readable(run):
                    return found, run, True
                run = self._runs[at] = _Bytes(bytes(run.vector.nbytes))
            view = run.data
            if found and (nbytes + len(view) > JOINED_BYTES or len(found) == MAX_RUNS):
                return found, None, True
            found.append(view)
            nbytes += len(view)
        return found, None, False

    def _readable(self, payload: _Payload) -> bool:
        """Make sure that a payload can be read until `push` returns. Returns False where it cannot: its transfer has
        ended, and zeros take its place."""
        owner = payload.owner
        if owner is not None and owner not in self._pinned:
            if not owner.pin():
                payload.spoilt = True
                return False
            self._pinned.append(owner)
        return True

    def _advance(self, sent: int) -> None:
        """So many bytes have left, of those before a payload and of that."""
        runs = self._runs
        while runs:
            run = runs[0]
            if isinstance(run, _Payload):
                if not run.vector.nbytes:
                    runs.popleft()
                return
            if sent < len(run.data):
                run.data = run.data[sent:]
                return
            sent -= len(run.data)
            runs.popleft()


class _Bytes:
    """Bytes that are ready to leave."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)


class _Payload:
    """A chunk's payload.

    owner: the transfer whose pages it lies in, None for a copy; moves: how often its items had moved when it was looked
    up."""

    __slots__ = ("moves", "owner", "spoilt", "vector")

    def __init__(self, lying: Vector, owner: OutgoingTransfer | None = None, moves: int = 0) -> None:
        self.vector = lying
        self.owner = owner
        self.moves = moves
        self.spoilt = False
        """Whether other bytes have left in its place."""


class _Trailer:
    """What comes after a payload, made when all of that has left."""

    __slots__ = ("_data", "_payload")

    def __init__(self, payload: _Payload) -> None:
        self._payload = payload
        self._data: memoryview | None = None

    @property
    def data(self) -> memoryview:
        if self._data is None:
            payload = self._payload
            moved = payload.owner is not None and payload.owner.moves != payload.moves
            self._data = memoryview(pack_trailer(payload.vector.digest(), spoilt=payload.spoilt or moved))
        return self._data

    @data.setter
    def data(self, data: memoryview) -> None:
        self._data = data


_Run = _Bytes | _Payload | _Trailer
"""Part of a batch; a payload's trailer follows it."""
