"""What is stored: a name and bytes, framed with a checksum. Pure.

Frame: magic (8), length of the name (u16), length of the payload (u64), xxh3-64 over name and payload (u64), all little
endian; then the name and the payload.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol

import xxhash

_HEAD = struct.Struct("<8sHQQ")
_MAGIC = b"PRFOBJ01"


class ObjectStore(Protocol):
    """A tier behind host memory. Safe for several threads. A fault is a miss, counted, and never an exception: without
    the store a server computes."""

    def contains(self, name: str) -> bool: ...

    def read(self, name: str, out: memoryview) -> bool:
        """Fill `out` with the payload of exactly that length. False: not there, of another length, or corrupt (then
        it is dropped); `out` may hold anything."""

    def write(self, name: str, payload: memoryview) -> bool:
        """Keep the object; True also where it was there already. False: it could not be kept."""

    def close(self) -> None: ...


def frame_head(name: str, payload: memoryview) -> bytes:
    """What comes before the payload."""
    encoded = name.encode()
    return _HEAD.pack(_MAGIC, len(encoded), len(payload), _checksum(encoded, payload)) + encoded


def head_bytes(name: str) -> int:
    """Length of `frame_head` for this name."""
    return _HEAD.size + len(name.encode())


def is_intact(name: str, head: bytes | bytearray | memoryview, payload: memoryview) -> bool:
    """Whether these bytes are the frame of this name and payload, whole and unchanged."""
    encoded = name.encode()
    if len(head) != _HEAD.size + len(encoded):
        return False
    magic, name_bytes, payload_bytes, checksum = _HEAD.unpack_from(head)
    return (
        magic == _MAGIC
        and name_bytes == len(encoded)
        and bytes(head[_HEAD.size :]) == encoded
        and payload_bytes == len(payload)
        and checksum == _checksum(encoded, payload)
    )


def _checksum(name: bytes, *payload: memoryview) -> int:
    digest = xxhash.xxh3_64(name)
    for part in payload:
        digest.update(part)
    return int(digest.intdigest())


def consecutive(found: Sequence[bool]) -> int:
    """How many of the first are true."""
    return next((index for index, there in enumerate(found) if not there), len(found))
