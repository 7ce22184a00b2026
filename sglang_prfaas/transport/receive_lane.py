"""The bytes of a decode rank's data connection, without its socket: where to put them, and what to answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sglang_prfaas.transport import vector
from sglang_prfaas.transport.codec.base import Codec
from sglang_prfaas.transport.codec.session import Place, SessionCodec
from sglang_prfaas.transport.framing import (
    HEADER_BYTES,
    RENEWAL,
    TRAILER_BYTES,
    ChunkHeader,
    Receipt,
    holds,
    payload_seed,
    unpack_header,
)
from sglang_prfaas.transport.incoming_transfer import Claim, IncomingTransfer
from sglang_prfaas.transport.memory import Bytes, Indices, RankMemory
from sglang_prfaas.transport.vector import Source, Vector

ACK_BYTES = 8 << 20
"""An acknowledgement goes out after so many bytes, or as soon as nothing more has come."""


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
        *,
        native: bool = False,
    ) -> None:
        self._memory = memory
        self._chunk_bytes = chunk_bytes
        self._find = find
        self._complete = complete
        self._native = native
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
        self._payload: Vector | None = None
        """Where the rest of a chunk's payload goes; None between chunks."""
        self._drained = False
        """Whether the chunk is not wanted."""
        self._staged = False
        """Whether the payload is put together elsewhere first."""
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

    def fill(self, source: Source) -> int | None:
        """Receive until less comes than there is room for, or a chunk has ended or begun. Returns how many bytes came,
        0 at the end, None for none yet. Raises as the source does; ChecksumError where the connection cannot be made
        sense of any more, ProtocolError for a chunk that must not be."""
        return self._fill(
            lambda payload, frame: payload.pull(source, frame) if payload is not None else source.receive([frame])
        )

    def take(self, data: memoryview) -> None:
        """Bytes that came already. Raises as `fill`."""

        def put(payload: Vector | None, frame: memoryview) -> int:
            count = payload.put(data) if payload is not None else 0
            rest = data[count : count + len(frame)]
            frame[: len(rest)] = rest
            return count + len(rest)

        while data:
            if self.between_chunks and len(data) >= HEADER_BYTES:
                self._frame[TRAILER_BYTES:], data = data[:HEADER_BYTES], data[HEADER_BYTES:]
                self._begin_chunk()
            else:
                data = data[self._fill(put) or 0 :]

    def _fill(self, move: Callable[[Vector | None, memoryview], int | None]) -> int | None:
        """move: fills what is left of a payload, and then the frame after it."""
        claim = self._claim
        if claim is not None and not claim.pin():
            self._revoked = claim.revoked
            claim = self._claim = None
            self._drain()
        payload, frame = self._payload, self._frame[self._framed :]
        missing_bytes = payload.nbytes if payload is not None else 0
        try:
            count = move(payload, frame)
        finally:
            if claim is not None:
                claim.unpin()
        self.short = count is None or count < missing_bytes + len(frame)
        if count is not None and count > missing_bytes:
            self._framed += count - missing_bytes
        if self._header is not None and self._framed >= TRAILER_BYTES:
            self._finish()
        if self._framed == len(self._frame):
            self._begin_chunk()
        return count

    @property
    def wanted_bytes(self) -> int:
        """So many bytes at least are still to come before anything can be done with them."""
        missing_bytes = self._payload.nbytes if self._payload is not None else 0
        return missing_bytes + TRAILER_BYTES - self._framed if self._header is not None else 1

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
        self._drained = False
        payload, seed = None, payload_seed(self._raw)
        if place.codec is None:
            buffer = self._memory.components[header.component][header.buffer]
            indices = item.indices[header.component]
            payload = vector.of_items(buffer, indices, 0, header.offset, header.length, seed, native=self._native)
        self._staged = payload is None
        self._payload = payload or self._scratch_vector(header.length, seed)

    def _drain(self) -> None:
        """The rest of the chunk is not wanted."""
        assert self._header is not None
        self._drained = True
        missing_bytes = self._payload.nbytes if self._payload is not None else self._header.length
        self._payload = self._scratch_vector(missing_bytes, None) if missing_bytes else None

    def _scratch_vector(self, nbytes: int, seed: int | None) -> Vector:
        return vector.of_bytes(self._scratch_memory()[:nbytes].data, seed, native=self._native)

    def _scratch_memory(self) -> Bytes:
        if self._scratch is None:
            self._scratch = self._memory.staging(self._chunk_bytes)
        return self._scratch

    def _finish(self) -> None:
        """All of a chunk is there."""
        header, claim, item = self._header, self._claim, self._item
        assert header is not None
        payload, self._payload = self._payload, None
        self._header = self._claim = self._item = None
        good = not self._revoked
        right = not self._drained and payload is not None and holds(self._frame[:TRAILER_BYTES], payload.digest())
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
