"""Bytes of data connections."""

from __future__ import annotations

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.errors import ChecksumError, PeerError, ProtocolError
from sglang_prfaas.transport.framing import (
    CHUNK_HEAD,
    HEADER_BYTES,
    MAX_CHUNK_BYTES,
    PREFACE,
    TRAILER_BYTES,
    ChunkHeader,
    Preface,
    Receipt,
    ReceiptReader,
    holds,
    pack_chunk,
    pack_header,
    pack_trailer,
    unpack_header,
    unpack_preface,
)

headers = st.builds(
    ChunkHeader,
    transfer_id=st.integers(0, (1 << 63) - 1),
    component=st.integers(0, 65535),
    buffer=st.integers(0, 65535),
    offset=st.integers(0, (1 << 64) - 1),
    length=st.just(0),
)


def chunk(header: ChunkHeader, payload: bytes) -> bytes:
    sized = ChunkHeader(header.transfer_id, header.component, header.buffer, header.offset, len(payload))
    return pack_chunk(sized, payload)


def digest(head: bytes, payload: bytes) -> int:
    """A payload's checksum, by docs/protocol.md."""
    result: int = xxhash.xxh3_64_intdigest(payload, seed=xxhash.xxh3_64_intdigest(head[:28]))
    return result


def parse(data: bytes, max_chunk_bytes: int = MAX_CHUNK_BYTES) -> tuple[ChunkHeader, bytes]:
    """What a receiver makes of the bytes of one chunk. Raises PeerError."""
    raw = data[:HEADER_BYTES]
    header = unpack_header(raw, max_chunk_bytes)
    payload = data[HEADER_BYTES : HEADER_BYTES + header.length]
    trailer = data[HEADER_BYTES + header.length :]
    if len(trailer) != TRAILER_BYTES:
        raise ChecksumError("trailer")
    if not holds(trailer, digest(raw, payload)):
        raise ChecksumError("payload")
    return header, payload


@given(headers, st.binary(min_size=1, max_size=300))
def test_round_trip(header: ChunkHeader, payload: bytes) -> None:
    got, body = parse(chunk(header, payload))
    assert body == payload
    assert (got.transfer_id, got.component, got.buffer, got.offset, got.length) == (
        header.transfer_id,
        header.component,
        header.buffer,
        header.offset,
        len(payload),
    )


@given(headers, st.binary(min_size=1, max_size=64), st.data())
def test_every_flipped_bit_is_noticed(header: ChunkHeader, payload: bytes, data: st.DataObject) -> None:
    good = chunk(header, payload)
    bit = data.draw(st.integers(0, len(good) * 8 - 1))
    bad = bytearray(good)
    bad[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PeerError):
        parse(bytes(bad))


def test_every_single_bit_of_one_chunk() -> None:
    good = chunk(ChunkHeader(7, 1, 2, 4096, 0), b"sixteen bytes...")
    for bit in range(len(good) * 8):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PeerError):
            parse(bytes(bad))


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        unpack_header(data)


def test_a_corrupt_length_is_noticed_before_the_payload_is_read() -> None:
    good = bytearray(chunk(ChunkHeader(7, 1, 2, 4096, 0), b"x" * 100))
    good[27] ^= 1
    with pytest.raises(ChecksumError, match="header is corrupt"):
        unpack_header(bytes(good[:HEADER_BYTES]))


def test_lengths_have_bounds() -> None:
    raw = chunk(ChunkHeader(7, 1, 2, 0, 0), b"x" * 101)[:HEADER_BYTES]
    assert unpack_header(raw, 101).length == 101
    with pytest.raises(ProtocolError, match="101 bytes, expected 1 to 100"):
        unpack_header(raw, 100)
    with pytest.raises(ProtocolError, match="0 bytes"):
        unpack_header(pack_header(ChunkHeader(7, 1, 2, 0, 0)))


def test_wrong_magic_and_checksum_messages_hold_both_values() -> None:
    data = chunk(ChunkHeader(7, 1, 2, 4096, 0), b"payload")
    with pytest.raises(ChecksumError, match="b'XFC1', expected b'PFC1'"):
        unpack_header(b"X" + data[1:HEADER_BYTES])
    with pytest.raises(ChecksumError, match=r"checksum [0-9a-f]{8}, expected [0-9a-f]{8}"):
        unpack_header(data[:20] + b"\1" + data[21:HEADER_BYTES])


@pytest.mark.parametrize("payload", [b"pAyload", b"payloa", b"payloadd", b""])
def test_another_payload_does_not_hold(payload: bytes) -> None:
    data = chunk(ChunkHeader(7, 1, 2, 4096, 0), b"payload")
    assert not holds(data[-TRAILER_BYTES:], digest(data[:HEADER_BYTES], payload))


def test_a_spoilt_trailer_does_not_hold() -> None:
    data = chunk(ChunkHeader(7, 1, 2, 4096, 0), b"payload")
    right = digest(data[:HEADER_BYTES], b"payload")
    assert pack_trailer(right) == data[-TRAILER_BYTES:]
    assert holds(pack_trailer(right), right)
    assert not holds(pack_trailer(right, spoilt=True), right)


def test_sizes_are_those_of_the_document() -> None:
    assert (PREFACE.size, CHUNK_HEAD.size, HEADER_BYTES, TRAILER_BYTES) == (24, 28, 32, 8)


@given(st.integers(0, 65535), st.binary(min_size=16, max_size=16))
def test_preface_round_trip(index: int, token: bytes) -> None:
    assert unpack_preface(Preface(index, token).pack()) == Preface(index, token)


def test_preface_of_another_protocol_or_version() -> None:
    good = Preface(1, b"t" * 16).pack()
    with pytest.raises(ProtocolError, match="begins with b'GET '"):
        unpack_preface(b"GET " + good[4:])
    with pytest.raises(ProtocolError, match="version 1, expected 3"):
        unpack_preface(good[:4] + b"\x00\x01" + good[6:])


@pytest.mark.parametrize("again", [False, True])
def test_every_single_bit_of_a_receipt(again: bool) -> None:
    good = Receipt(0x0123456789ABCDEF, again).pack()
    assert ReceiptReader().feed(good) == [Receipt(0x0123456789ABCDEF, again)]
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ChecksumError, match="receipt is corrupt"):
            ReceiptReader().feed(bytes(bad))


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=5), st.data())
def test_chunks_split_anywhere_are_put_together(payloads: list[bytes], data: st.DataObject) -> None:
    """A receiver that reads exactly what it needs gets the same chunks, however the stream arrives."""
    stream = b"".join(chunk(ChunkHeader(i, 0, 0, i, 0), payload) for i, payload in enumerate(payloads))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(stream) - 1), max_size=8)))
    parts = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    buffered, got = b"", []
    for part in parts:
        buffered += part
        while len(buffered) >= HEADER_BYTES:
            length = unpack_header(buffered[:HEADER_BYTES]).length
            size = HEADER_BYTES + length + TRAILER_BYTES
            if len(buffered) < size:
                break
            got.append(parse(buffered[:size])[1])
            buffered = buffered[size:]
    assert got == payloads
    assert buffered == b""
