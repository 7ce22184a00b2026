"""Bytes of a data connection (docs/protocol.md): one preface, then chunks one way and receipts the other.

    preface   "PFD1"  u16 version  u16 connection index  16 bytes token
    chunk     "PFC1"  u16 component  u16 buffer  u64 transfer id  u64 offset  u32 length  u32 head check
              payload  u64 checksum
    encoded   "PFE1", else as a chunk, but u32 first item  u32 items  in place of the offset
    renewal   "PFN1"  and 28 zero bytes: the last of a connection, to be dialled again with the same preface
    receipt   "PFA1" (all before this number are dealt with) or "PFX1" (send this one again)  u32 check  u64 number

Big-endian. A stream is (transfer, component, buffer): the request's items of that buffer, end to end; `offset` is a
byte position in it. H is xxh3-64 of the first 28 bytes; the head check is its low 32 bits, so that a corrupt length is
noticed before it is believed. The checksum is xxh3-64 of the payload with seed H; it comes last, so that either end
makes it while it has the bytes at hand to copy them. Receipts count the chunks of their own connection, from 0; their
check is the low 32 bits of xxh3-64 of magic and number.
"""

from __future__ import annotations

import struct

import xxhash
from msgspec import Struct

from sglang_prfaas.errors import ChecksumError, ProtocolError

PREFACE = struct.Struct(">4sHH16s")
CHUNK_HEAD = struct.Struct(">4sHHQQI")
HEAD_CHECK = struct.Struct(">I")
TRAILER = struct.Struct(">Q")
RECEIPT = struct.Struct(">4sIQ")
HEADER_BYTES = CHUNK_HEAD.size + HEAD_CHECK.size
TRAILER_BYTES = TRAILER.size
PREFACE_MAGIC = b"PFD1"
CHUNK_MAGIC = b"PFC1"
ENCODED_MAGIC = b"PFE1"
RENEWAL = b"PFN1".ljust(HEADER_BYTES, b"\0")
ACK_MAGIC = b"PFA1"
AGAIN_MAGIC = b"PFX1"
DATA_VERSION = 3
MAX_CHUNK_BYTES = 64 << 20

Payload = memoryview | bytes


class Preface(Struct, frozen=True):
    """First bytes of a data connection: which session it belongs to."""

    index: int
    token: bytes

    def pack(self) -> bytes:
        return PREFACE.pack(PREFACE_MAGIC, DATA_VERSION, self.index, self.token)


def unpack_preface(data: bytes) -> Preface:
    """Parse a preface of `PREFACE.size` bytes. Raises ProtocolError."""
    magic, version, index, token = PREFACE.unpack(data)
    if magic != PREFACE_MAGIC:
        raise ProtocolError(f"data connection begins with {magic!r}, expected {PREFACE_MAGIC!r}")
    if version != DATA_VERSION:
        raise ProtocolError(f"data protocol version {version}, expected {DATA_VERSION}")
    return Preface(index, token)


class ChunkHeader(Struct, frozen=True):
    """Where a chunk's payload belongs. `offset` and `length` in bytes of its stream; where its items are encoded,
    `offset` is the number of the first, and `length` what they take on the wire."""

    transfer_id: int
    component: int
    buffer: int
    offset: int
    length: int
    items: int = 0
    """Encoded items; 0 where the bytes are sent as they are."""


def pack_header(header: ChunkHeader) -> bytes:
    """The `HEADER_BYTES` bytes before a chunk's payload."""
    magic, offset = CHUNK_MAGIC, header.offset
    if header.items:
        magic, offset = ENCODED_MAGIC, offset << 32 | header.items
    head = CHUNK_HEAD.pack(magic, header.component, header.buffer, header.transfer_id, offset, header.length)
    return head + HEAD_CHECK.pack(_hash(head) & 0xFFFFFFFF)


def unpack_header(data: bytes | memoryview, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> ChunkHeader:
    """Parse a header of `HEADER_BYTES` bytes. Raises ProtocolError for an excessive length, ChecksumError where the
    header itself is corrupt, its magic included."""
    magic, component, buffer, transfer_id, offset, length = CHUNK_HEAD.unpack_from(data)
    if magic not in (CHUNK_MAGIC, ENCODED_MAGIC):
        raise ChecksumError(f"chunk begins with {bytes(magic)!r}, expected {CHUNK_MAGIC!r} or {ENCODED_MAGIC!r}")
    (head_check,) = HEAD_CHECK.unpack_from(data, CHUNK_HEAD.size)
    actual = _hash(data[: CHUNK_HEAD.size]) & 0xFFFFFFFF
    if actual != head_check:
        raise ChecksumError(f"chunk header is corrupt: checksum {actual:08x}, expected {head_check:08x}")
    if not 0 < length <= max_chunk_bytes:
        raise ProtocolError(f"chunk of {length} bytes, expected 1 to {max_chunk_bytes}")
    if magic == CHUNK_MAGIC:
        return ChunkHeader(transfer_id, component, buffer, offset, length)
    first_item, items = offset >> 32, offset & 0xFFFFFFFF
    if not items:
        raise ProtocolError("encoded chunk of no items")
    return ChunkHeader(transfer_id, component, buffer, first_item, length, items)


def payload_seed(head: bytes | memoryview) -> int:
    """The seed of a payload's checksum: H. head: `HEADER_BYTES` bytes."""
    return _hash(head[: CHUNK_HEAD.size])


def pack_trailer(digest: int, *, spoilt: bool = False) -> bytes:
    """The `TRAILER_BYTES` bytes after a payload with this checksum; `spoilt`: such that the peer asks for it again."""
    return TRAILER.pack(digest ^ 1 if spoilt else digest)


def holds(trailer: bytes | memoryview, digest: int) -> bool:
    """Whether a payload with this checksum is right."""
    expected: int = TRAILER.unpack(trailer)[0]
    return expected == digest


def pack_chunk(header: ChunkHeader, *payload: Payload) -> bytes:
    """A whole chunk."""
    head = pack_header(header)
    whole = payload[0] if len(payload) == 1 else b"".join(payload)
    digest: int = xxhash.xxh3_64_intdigest(whole, seed=payload_seed(head))
    return b"".join((head, whole, TRAILER.pack(digest)))


class Receipt(Struct, frozen=True):
    """What became of the chunks of a connection. again: chunk `number` is to be sent once more; else: all chunks before
    `number` are in place, or not wanted."""

    number: int
    again: bool = False

    def pack(self) -> bytes:
        magic = AGAIN_MAGIC if self.again else ACK_MAGIC
        return RECEIPT.pack(magic, _receipt_check(magic, self.number), self.number)


class ReceiptReader:
    """Receipts out of the bytes that a decode rank sends after its preface."""

    def __init__(self) -> None:
        self._data = b""

    def feed(self, data: bytes) -> list[Receipt]:
        """The receipts that are complete now. Raises ChecksumError for a corrupt one."""
        if self._data:
            data = self._data + data
        whole = len(data) // RECEIPT.size * RECEIPT.size
        self._data = data[whole:]
        return [_unpack_receipt(*fields) for fields in RECEIPT.iter_unpack(data[:whole])]


def _unpack_receipt(magic: bytes, check: int, number: int) -> Receipt:
    if magic not in (ACK_MAGIC, AGAIN_MAGIC) or check != _receipt_check(magic, number):
        raise ChecksumError(f"receipt is corrupt: {magic!r}, check {check:08x}")
    return Receipt(number, magic == AGAIN_MAGIC)


def _receipt_check(magic: bytes, number: int) -> int:
    result: int = xxhash.xxh3_64_intdigest(magic + number.to_bytes(8, "big")) & 0xFFFFFFFF
    return result


def _hash(head: bytes | memoryview) -> int:
    result: int = xxhash.xxh3_64_intdigest(head)
    return result
