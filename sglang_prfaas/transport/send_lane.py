"""The bytes of a prefill rank's data connection, without its socket: which to send next, and whose they are."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from sglang_prfaas.transport.codec.session import SessionCodec
from sglang_prfaas.transport.framing import ChunkHeader, pack_header
from sglang_prfaas.transport.memory import Bytes, RankMemory, TorchBuffer
from sglang_prfaas.transport.outbox import Task
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.views import split

logger = logging.getLogger(__name__)

MAX_PARTS = 512
"""Separate pieces of memory in one call; the kernel takes 1024."""
MIN_LENT_BYTES = 64 << 10
"""Chunks below this are copied: that costs less than the calls for handing their pages over."""


class SendLane:
    """A batch of chunks on its way, straight from the pages where they can be sent from there.

    Add chunks, then send what `begin` returns, report it with `advance`, and end with `end`, until `begin` returns
    nothing. Should a transfer end in the meantime, zeros take the place of its bytes: the peer knows already, or finds
    the checksum wrong. Where items moved after their checksum was made, and something else was written to their old
    slots before they left, the peer finds it wrong too, and the chunk is sent again from the new ones."""

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
        self.lending = False
        """Whether what `begin` returned last may be lent to the kernel."""
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
                    encoded = self._encoded(task, plain)
                    if encoded is not None:
                        (header, views), owner = encoded, None
                    else:
                        header = plain
                        views, owner = self._payload(task)
                    head = pack_header(header, *views)
                if copy:
                    head, views = b"".join((head, *views)), []
            finally:
                transfer.unpin()
        except Exception as error:
            logger.exception("prfaas: a chunk of room %d could not be read", transfer.room)
            self._failed(transfer, f"prefill could not read a chunk: {error}")
            return False
        self._runs.append(_Run([memoryview(head)], None, lendable=False))
        if views:
            lendable = owner is not None and span.length >= MIN_LENT_BYTES
            self._runs.append(_Run(views, owner, lendable=lendable))
        self._parts += 1 + len(views)
        self.batch_bytes += header.length
        task.wire_bytes = header.length
        return True

    def _encoded(self, task: Task, header: ChunkHeader) -> tuple[ChunkHeader, list[memoryview]] | None:
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
        return msgspec.structs.replace(header, offset=first_item, items=items, length=len(payload)), [payload.data]

    def _payload(self, task: Task) -> tuple[list[memoryview], OutgoingTransfer | None]:
        """A chunk's bytes, and the transfer whose pages they lie in: None for a copy."""
        span = task.span
        buffer = self._memory.components[span.component][span.buffer]
        views = buffer.views(task.indices, task.first_item, span.offset, span.length)
        if views:
            return views, task.transfer
        if self._staging is None or self._staged + span.length > len(self._staging):
            self._staging, self._staged = np.empty(2 * self._chunk_bytes, np.uint8), 0
        out = self._staging[self._staged : self._staged + span.length]
        buffer.gather(task.indices, task.first_item, span.offset, out)
        self._staged += span.length
        return [out.data], None

    @property
    def empty(self) -> bool:
        """Whether all of the batch has left."""
        return not self._runs

    @property
    def more(self) -> bool:
        """Whether the batch has more than `begin` returned."""
        return self._begun < len(self._runs)

    _begun = 0
    """Runs that `begin` returned."""

    def begin(self, *, lend: bool = False) -> list[memoryview]:
        """What is to be sent now, without waiting for anything; `end` must follow. With `lend`, all of it may be lent,
        or none of it: see `lending`."""
        found: list[memoryview] = []
        self._begun = 0
        self.lending = lend and bool(self._runs) and self._runs[0].lendable
        for run in self._runs:
            if found and (len(found) + len(run.views) > MAX_PARTS or (lend and run.lendable is not self.lending)):
                break
            if run.owner is not None and run.owner not in self._pinned:
                if run.owner.pin():
                    self._pinned.append(run.owner)
                else:
                    run.blank()
                    if self.lending and found:
                        break
                    self.lending = False
            found += run.views
            self._begun += 1
        return found

    def end(self) -> None:
        """What `begin` returned is not looked at any more."""
        for owner in self._pinned:
            owner.unpin()
        self._pinned.clear()

    def advance(self, sent: int) -> None:
        """So many bytes have left."""
        runs = self._runs
        while runs and sent >= runs[0].nbytes:
            sent -= runs.popleft().nbytes
        if sent:
            runs[0].drop(sent)


class _Run:
    """Bytes of a batch that belong together."""

    __slots__ = ("lendable", "nbytes", "owner", "views")

    def __init__(self, views: list[memoryview], owner: OutgoingTransfer | None, *, lendable: bool) -> None:
        """owner: the transfer whose pages they lie in; None for bytes of the lane's own. lendable: whether they stay as
        they are until the peer has them, unless the transfer ends."""
        self.views = views
        self.owner = owner
        self.lendable = lendable
        self.nbytes = sum(map(len, views))

    def drop(self, sent: int) -> None:
        """Fewer than all of its bytes have left."""
        self.nbytes -= sent
        self.views = split(self.views, sent)[1]

    def blank(self) -> None:
        """Its transfer has ended: zeros from here on."""
        self.views = [memoryview(bytes(self.nbytes))]
        self.owner, self.lendable = None, False
