"""The bytes of a decode rank's data connection, without its socket: where to put them, and what to answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sglang_prfaas.transport.codec.base import Codec
from sglang_prfaas.transport.codec.session import Place, SessionCodec
from sglang_prfaas.transport.framing import (
    HEADER_BYTES,
    RENEWAL,
    TRAILER_BYTES,
    ChunkHeader,
    PayloadCheck,
    Receipt,
    unpack_header,
)
from sglang_prfaas.transport.incoming_transfer import Claim, IncomingTransfer
from sglang_prfaas.transport.memory import Bytes, Indices, RankMemory
from sglang_prfaas.transport.views import cut, split

ACK_BYTES = 8 << 20
"""An acknowledgement goes out after so many bytes, or as soon as nothing more has come."""


MAX_PIECE_BYTES = 512 << 10
"""Received in one call, and checked before the next: so much stays in a core's cache."""


Receive = Callable[[list[memoryview]], int | None]
"""Fills views from the front, and waits for nothing. Returns how many bytes came, 0 at the end, None for none yet."""


class Placement:
    """A request's transfer and where its items belong."""

    def __init__(self, transfer: IncomingTransfer, indices: tuple[Indices, ...]) -> None:
        self.transfer = transfer
        self.indices = indices


class ReceiveLane:
    """Chunks of one data connection, received straight into their pages where that is possible.

    `fill` it again and again. `find` returns the request of a transfer id, or None; `complete` is called with a
    transfer whose last byte is in place."""

    def __init__(
        self,
        memory: RankMemory,
        chunk_bytes: int,
        find: Callable[[int], Placement | None],
        complete: Callable[[IncomingTransfer], None],
        codec: SessionCodec | None = None,
    ) -> None:
        self._memory = memory
        self._chunk_bytes = chunk_bytes
        self._find = find
        self._complete = complete
        self._codec = codec or SessionCodec()
        self._frame = memoryview(bytearray(TRAILER_BYTES + HEADER_BYTES))
        """The trailer of a chunk, and the header of the next."""
        self._framed = TRAILER_BYTES
        """Bytes of it that are there, or that do not come: before the first chunk there is no trailer."""
        self._raw = b""
        self._header: ChunkHeader | None = None
        self._place_of: Place | None = None
        self._item: Placement | None = None
        self._claim: Claim | None = None
        self._revoked = False
        self._check: PayloadCheck | None = None
        """None where the chunk is drained."""
        self._pieces: list[tuple[list[memoryview], int]] = []
        """Where the rest of the payload goes, and how many bytes, in reverse: each is received in one call."""
        self._missing_bytes = 0
        self._staged = False
        self._scratch: Bytes | None = None
        self._decoded: Bytes | None = None
        self._handled = 0
        self._acknowledged = 0
        self._since_ack_bytes = 0
        self._answers = bytearray()
        self.short = False
        """Whether less came last than there was room for."""
        self.renewed = False
        """Whether prefill wants the connection made anew."""

    # --- input ----------------------------------------------------------------------------------------------------

    def fill(self, receive: Receive) -> int | None:
        """Receive until less comes than there is room for, or a chunk has ended or begun. Returns how many bytes came;
        else what `receive` returned. Raises as it does; ChecksumError where the connection cannot be made sense of any
        more, ProtocolError for a chunk that must not be."""
        claim = self._claim
        if claim is not None and not claim.pin():
            self._revoked = claim.revoked
            claim = self._claim = None
            self._drain()
        try:
            count = self._fill(receive)
        finally:
            if claim is not None:
                claim.unpin()
        if self._header is not None and self._framed >= TRAILER_BYTES:
            self._finish()
        if self._framed == len(self._frame):
            self._begin_chunk()
        return count

    def _fill(self, receive: Receive) -> int | None:
        pieces, check, total = self._pieces, self._check, 0
        self.short = False
        while len(pieces) > 1:
            views, nbytes = pieces[-1]
            count = receive(views)
            if count != nbytes:
                return self._came_short(views, nbytes, count, total)
            pieces.pop()
            self._missing_bytes -= nbytes
            total += nbytes
            if check is not None:
                check.update(views)
        views, nbytes = pieces[0] if pieces else ([], 0)
        count = receive([*views, self._frame[self._framed :]])
        if count is None or count < nbytes or not count:
            return self._came_short(views, nbytes, count, total)
        if pieces:
            pieces.clear()
            self._missing_bytes = 0
            if check is not None:
                check.update(views)
        self._framed += count - nbytes
        self.short = self._framed < len(self._frame)
        return total + count

    def _came_short(self, views: list[memoryview], nbytes: int, count: int | None, before: int) -> int | None:
        """Of a piece less came than it has."""
        self.short = True
        if not count:
            return before or count
        came, rest = split(views, count)
        self._pieces[-1] = rest, nbytes - count
        self._missing_bytes -= count
        if self._check is not None:
            self._check.update(came)
        return before + count

    def take(self, data: memoryview) -> None:
        """Bytes that came already. Raises as `fill`."""

        def receive(views: list[memoryview]) -> int:
            nonlocal data
            count = 0
            for view in views:
                part = data[: len(view)]
                view[: len(part)] = part
                data = data[len(part) :]
                count += len(part)
                if not data:
                    break
            return count

        while data:
            if self.between_chunks and len(data) >= HEADER_BYTES:
                self._frame[TRAILER_BYTES:], data = data[:HEADER_BYTES], data[HEADER_BYTES:]
                self._begin_chunk()
            else:
                self.fill(receive)

    @property
    def wanted_bytes(self) -> int:
        """So many bytes at least are still to come before anything can be done with them."""
        return self._missing_bytes + TRAILER_BYTES - self._framed if self._header is not None else 1

    @property
    def between_chunks(self) -> bool:
        """Whether no chunk has begun that has not ended."""
        return self._header is None and self._framed == TRAILER_BYTES

    def _begin_chunk(self) -> None:
        self._raw = bytes(self._frame[TRAILER_BYTES:])
        if self._raw == RENEWAL:
            self._framed = TRAILER_BYTES
            self.renewed = True
            return
        self._framed = 0
        header = self._header = unpack_header(self._raw, self._chunk_bytes)
        self._missing_bytes = header.length
        self._revoked = False
        place = self._place_of = self._codec.place(header, self._chunk_bytes)
        item = self._item = self._find(header.transfer_id)
        self._claim = None
        if item is not None:
            transfer = item.transfer
            with transfer.lock:
                if transfer.live:
                    self._claim = transfer.claim(place.header)
        if item is None or self._claim is None:
            self._drain()
            return
        views: list[memoryview] = []
        if place.codec is None:
            buffer = self._memory.components[header.component][header.buffer]
            views = buffer.views(item.indices[header.component], 0, header.offset, header.length)
        self._staged = not views
        self._expect(views or [self._scratch_memory()[: header.length].data])
        self._check = PayloadCheck(self._raw)

    def _drain(self) -> None:
        """The rest of the chunk is not wanted."""
        self._check = None
        self._expect([self._scratch_memory()[: self._missing_bytes].data])

    def _expect(self, views: list[memoryview]) -> None:
        """The rest of the chunk goes there."""
        self._pieces = cut(views, MAX_PIECE_BYTES)
        self._pieces.reverse()

    def _scratch_memory(self) -> Bytes:
        if self._scratch is None:
            self._scratch = self._memory.staging(self._chunk_bytes)
        return self._scratch

    def _finish(self) -> None:
        """All of a chunk is there."""
        header, claim, item = self._header, self._claim, self._item
        assert header is not None
        check, self._check = self._check, None
        self._header = self._claim = self._item = None
        good = not self._revoked
        right = check is not None and check.holds(self._frame[:TRAILER_BYTES])
        if claim is not None and item is not None:
            transfer = claim.transfer
            good = right and (not self._staged or self._place(claim, item, header))
            with transfer.lock:
                good = good and not claim.revoked
                if good:
                    complete = transfer.received(claim, header.length)
                else:
                    complete = False
                    if transfer.live and not claim.revoked:
                        transfer.corrupt_chunks += 1
                    transfer.give_up(claim)
                good = good or not transfer.live
            if complete:
                self._complete(transfer)
        if not good:
            self._answers += Receipt(self._handled, again=True).pack()
        self._handled += 1
        self._since_ack_bytes += header.length

    def _place(self, claim: Claim, item: Placement, header: ChunkHeader) -> bool:
        """Copy the payload to its place. Returns False where that is not its place any more."""
        place = self._place_of
        assert place is not None
        data = self._scratch_memory()[: header.length]
        if place.codec is not None:
            data = self._decode(place, place.codec, header.length)
        if not claim.pin():
            return False
        try:
            indices = item.indices[header.component]
            buffer = self._memory.components[header.component][header.buffer]
            buffer.scatter(indices, 0, place.header.offset, data)
        finally:
            claim.unpin()
        return True

    def _decode(self, place: Place, codec: Codec, wire_bytes: int) -> Bytes:
        """The chunk's items as they belong into memory. Raises ProtocolError."""
        if self._decoded is None:
            self._decoded = np.empty(self._chunk_bytes, np.uint8)
        data = self._decoded[: place.header.length]
        codec.decode(self._scratch_memory()[:wire_bytes], data.reshape(-1, codec.item_bytes))
        return data

    def lost(self) -> None:
        """The connection is gone: what it had begun is left to others."""
        claim, self._claim = self._claim, None
        if claim is not None:
            with claim.transfer.lock:
                claim.transfer.give_up(claim)

    # --- output ---------------------------------------------------------------------------------------------------

    def answers(self, *, idle: bool) -> bytes:
        """Receipts to be sent now. idle: nothing more has come so far."""
        if self._handled == self._acknowledged and not self._answers:
            return b""
        due = self._since_ack_bytes >= ACK_BYTES or (idle and self.between_chunks) or self._answers
        if due and self._handled > self._acknowledged:
            self._answers += Receipt(self._handled).pack()
            self._acknowledged = self._handled
            self._since_ack_bytes = 0
        found = bytes(self._answers)
        self._answers.clear()
        return found
