"""One request's transfer at the decode end, see `transfer.py`: which bytes are in place, and who may write where."""

from __future__ import annotations

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.framing import ChunkHeader
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.streams import RangeSet
from sglang_prfaas.transport.transfer import State, Transfer

MAX_FRAGMENTS = 1 << 16
"""Separate byte ranges remembered per stream; a peer that leaves more gaps than this is refused."""


class Claim:
    """Bytes of a transfer that one data connection fills. Until it ends, no other connection writes there."""

    __slots__ = ("busy", "header", "revoked", "transfer")

    def __init__(self, transfer: IncomingTransfer, header: ChunkHeader) -> None:
        self.transfer = transfer
        self.header = header
        self.revoked = False
        self.busy = False

    def overlaps(self, other: ChunkHeader) -> bool:
        ours = self.header
        return (
            (ours.component, ours.buffer) == (other.component, other.buffer)
            and ours.offset < other.offset + other.length
            and other.offset < ours.offset + ours.length
        )

    def pin(self) -> bool:
        """Begin to write; as `Transfer.pin`. False too where another connection has taken the bytes over."""
        with self.transfer.lock:
            if self.revoked or self.transfer._ending or not self.transfer.live:
                return False
            self.busy = True
            self.transfer._pins += 1
            return True

    def unpin(self) -> None:
        """The write is over."""
        with self.transfer.lock:
            self.busy = False
            self.transfer._pins -= 1
            if self.revoked or self.transfer._ending:
                self.transfer._unpinned.notify_all()


class IncomingTransfer(Transfer):
    """A request on the decode side: which bytes have arrived of those it reserved pages for.

    A transfer of which no byte is expected is DONE from the start."""

    def __init__(self, room: int, transfer_id: int, layout: Layout, counts: tuple[int, ...], clock: Clock) -> None:
        super().__init__(room, clock, State.EXPECTING)
        self.transfer_id = transfer_id
        self.counts = counts
        self.expected_bytes = layout.request_bytes(counts)
        self.duplicate_bytes = 0
        self._claims: list[Claim] = []
        self._sizes = tuple(
            tuple(size * count for size in component.item_bytes)
            for component, count in zip(layout.components, counts, strict=True)
        )
        self._ranges: dict[tuple[int, int], RangeSet] = {}
        if self.expected_bytes == 0:
            self._enter(State.DONE)

    @property
    def kv_bytes(self) -> int:
        """Of the bytes expected, those of full-attention items."""
        return sum(self._sizes[0])

    def check(self, header: ChunkHeader) -> None:
        """Raise ProtocolError for a chunk outside of what was expected, before any of its bytes is placed."""
        if header.component >= len(self._sizes) or header.buffer >= len(self._sizes[header.component]):
            raise ProtocolError(f"chunk for component {header.component}, buffer {header.buffer}, which do not exist")
        limit = self._sizes[header.component][header.buffer]
        if header.offset + header.length > limit:
            raise ProtocolError(
                f"chunk ends at byte {header.offset + header.length} of a stream of {limit} bytes (component "
                f"{header.component}, buffer {header.buffer})"
            )
        ranges = self._ranges.get((header.component, header.buffer))
        if ranges is not None and len(ranges) >= MAX_FRAGMENTS:
            raise ProtocolError(
                f"more than {MAX_FRAGMENTS} separate ranges of component {header.component}, buffer {header.buffer}"
            )

    def claim(self, header: ChunkHeader) -> Claim | None:
        """A data connection is about to bring a chunk. Returns None where its bytes are in place already. Another
        connection that has begun with the same bytes loses them: the sender has given that one up.

        Raises ProtocolError for a chunk outside of what was expected, or one that is cut otherwise than before."""
        self.check(header)
        ranges = self._ranges.get((header.component, header.buffer))
        covered = ranges.covered(header.offset, header.offset + header.length) if ranges is not None else 0
        if covered == header.length:
            self.duplicate_bytes += header.length
            self.resent_chunks += 1
            return None
        if covered:
            raise ProtocolError(
                f"chunk at offset {header.offset} of component {header.component}, buffer {header.buffer} was sent "
                "before in another size"
            )
        for other in [claim for claim in self._claims if claim.overlaps(header)]:
            other.revoked = True
            self._claims.remove(other)
            while other.busy:
                self._unpinned.wait()
        claim = Claim(self, header)
        self._claims.append(claim)
        return claim

    def give_up(self, claim: Claim) -> None:
        """The claim ends without its bytes: the chunk was corrupt, or its connection is lost."""
        if not claim.revoked:
            self._claims.remove(claim)
            claim.revoked = True

    def received(self, claim: Claim, wire_bytes: int | None = None) -> bool:
        """The claim's bytes are in place and were checked. Returns whether they were the last ones missing.
        wire_bytes: what they took on the wire, where that is another number."""
        self.give_up(claim)
        if not self.live:
            return False
        header = claim.header
        ranges = self._ranges.setdefault((header.component, header.buffer), RangeSet())
        self._progress(ranges.add(header.offset, header.offset + header.length), wire_bytes)
        if self._state is State.EXPECTING:
            self._enter(State.RECEIVING)
        return self.bytes == self.expected_bytes and self._end(State.DONE)

    def poll_timeout(self, waiting_s: float, transfer_s: float) -> str:
        """Why the transfer has taken too long, or an empty string. `waiting_s`: until the first byte, and between the
        bytes of two prefill chunks; the longer of both limits holds, as prefill may still be computing."""
        idle_s = self._clock.now_s() - self.progress_s
        limit_s = max(waiting_s, transfer_s)
        if self.live and idle_s > limit_s:
            return f"no byte for {limit_s:g} s, {self.bytes} of {self.expected_bytes} arrived"
        return ""
