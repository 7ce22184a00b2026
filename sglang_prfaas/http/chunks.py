"""Chunked transfer coding without I/O: where chunk boundaries lie, and the payload between them (RFC 9112 section 7.1).

The relay forwards chunk-coded bytes as they come, after the HTTP parser has checked them; this scanner is for the rare
cases that need positions: an upstream that dies in mid-chunk, and clients that cannot take chunks.
"""

from __future__ import annotations

from sglang_prfaas.errors import ProtocolError

LAST_CHUNK = b"0\r\n\r\n"


def encode_chunk(data: bytes) -> bytes:
    """One chunk. `data` must not be empty: an empty chunk ends the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class ChunkScanner:
    """Follows a chunk-coded body fed in any pieces. Raises ProtocolError for bytes that are not chunks."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._data_left = 0  # payload bytes of the current chunk still to come
        self._in_chunk = False
        self._in_trailer = False
        self.finished = False

    def feed(self, data: bytes) -> tuple[bytes, int]:
        """Take bytes in; returns (payload decoded, bytes of `data` up to and including the last complete chunk).

        The second number is 0 where no chunk was completed by these bytes.
        """
        before = len(self._pending)
        self._pending += data
        buffer = self._pending
        payload: list[bytes] = []
        pos = boundary = 0
        while not self.finished:
            if self._in_chunk:
                take = min(self._data_left, len(buffer) - pos)
                payload.append(bytes(buffer[pos : pos + take]))
                pos += take
                self._data_left -= take
                if self._data_left or len(buffer) - pos < 2:
                    break
                if buffer[pos : pos + 2] != b"\r\n":
                    raise ProtocolError(f"chunk must end in CRLF, got {bytes(buffer[pos : pos + 2])!r}")
                pos += 2
                boundary = pos
                self._in_chunk = False
                continue
            end = buffer.find(b"\r\n", pos)
            if end < 0:
                break
            line = bytes(buffer[pos:end])
            if self._in_trailer:
                pos = end + 2
                if not line:
                    self.finished = True
                    boundary = pos
                continue
            size_text = line.partition(b";")[0].strip()
            if not size_text or len(size_text) > 16 or not all(c in b"0123456789abcdefABCDEF" for c in size_text):
                raise ProtocolError(f"chunk size must be hexadecimal, got {line[:40]!r}")
            self._data_left = int(size_text, 16)
            pos = end + 2
            self._in_trailer = self._data_left == 0
            self._in_chunk = not self._in_trailer
        del buffer[:pos]
        return b"".join(payload), max(0, boundary - before)


def leading_payload(data: bytes, end: bytes) -> bytes | None:
    """Payload of the first chunks of a body, up to the one that completes `end`; None while more bytes are needed.

    The last chunk ends it too. Raises ProtocolError for bytes that are not chunks.
    """
    payload = b""
    pos = 0
    while True:
        line = data.find(b"\r\n", pos)
        if line < 0:
            return None
        try:
            size = int(data[pos:line].partition(b";")[0], 16)
        except ValueError:
            raise ProtocolError(f"chunk size must be hexadecimal, got {data[pos:line][:40]!r}") from None
        pos = line + 2 + size + 2
        if size and pos > len(data):
            return None
        payload += data[line + 2 : line + 2 + size]
        if not size or end in payload:
            return payload


def complete_chunks_length(data: bytes) -> int:
    """Bytes of `data`, which starts at a chunk boundary, that are complete data chunks (the last chunk not counted)."""
    pos = 0
    while True:
        end = data.find(b"\r\n", pos)
        if end < 0:
            return pos
        size = int(data[pos:end].partition(b";")[0].strip() or b"0", 16)
        after = end + 2 + size + 2
        if size == 0 or after > len(data):
            return pos
        pos = after
