"""What a site's prefix cache is asked over TCP or TLS, and how it answers. Pure.

    request   u32 length  u64 check  MessagePack: `Ask` or `Get`
    sizes     u32 length  u64 check  MessagePack: `Sizes`, the answer to `Ask`
    object    u64 length  frame      for each name of a `Get`, in order; length 0 ends the answer early

Big-endian; the check is xxh3-64 of the body. A frame carries its own checksum (`store.objects`). Names are sent as a
namespace and keys, and joined by `/`. There are no other requests: nothing can be written or listed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
import xxhash
from msgspec import Meta, Struct

from sglang_prfaas.errors import ChecksumError, ProtocolError

HEAD = struct.Struct(">IQ")
OBJECT_LENGTH = struct.Struct(">Q")
MAX_NAMES = 16384
"""Of one request."""
MAX_BODY_BYTES = 4 << 20
MAX_OBJECT_BYTES = 1 << 30

_Text = Annotated[str, Meta(min_length=1, max_length=128)]
Groups = tuple[tuple[str, tuple[str, ...]], ...]
"""(namespace, keys) each."""
_Wire = Annotated[
    tuple[tuple[_Text, Annotated[tuple[_Text, ...], Meta(max_length=MAX_NAMES)]], ...], Meta(max_length=16)
]


class Ask(Struct, frozen=True, tag="ask", array_like=True, forbid_unknown_fields=True):
    """Which of these are there?"""

    groups: _Wire


class Get(Struct, frozen=True, tag="get", array_like=True, forbid_unknown_fields=True):
    """Send these, up to the first that is not there."""

    groups: _Wire


class Sizes(Struct, frozen=True, tag="sizes", array_like=True, forbid_unknown_fields=True):
    """Length in bytes of every frame that was asked for; 0: not there."""

    frame_bytes: Annotated[tuple[Annotated[int, Meta(ge=0, le=MAX_OBJECT_BYTES)], ...], Meta(max_length=16 * MAX_NAMES)]


_requests = msgspec.msgpack.Decoder(Ask | Get)
_answers = msgspec.msgpack.Decoder(Sizes)


def names_of(groups: Groups) -> Iterator[str]:
    """The names of objects, in order."""
    return (f"{namespace}/{key}" for namespace, keys in groups for key in keys)


def count(groups: Groups) -> int:
    return sum(len(keys) for _, keys in groups)


def pack(message: Ask | Get | Sizes) -> bytes:
    """A message with its head. Raises ProtocolError for one that a peer would refuse."""
    body = msgspec.msgpack.encode(message)
    if len(body) > MAX_BODY_BYTES:
        raise ProtocolError(f"prefix cache message of {len(body)} bytes, {MAX_BODY_BYTES} are allowed")
    return HEAD.pack(len(body), xxhash.xxh3_64_intdigest(body)) + body


def body_bytes(head: bytes | bytearray) -> int:
    """Length of the body after this head. Raises ProtocolError."""
    length = int(HEAD.unpack(head)[0])
    if not 0 < length <= MAX_BODY_BYTES:
        raise ProtocolError(f"prefix cache message of {length} bytes announced, 1 to {MAX_BODY_BYTES} are allowed")
    return length


def unpack_request(head: bytes | bytearray, body: bytes | bytearray) -> Ask | Get:
    """Raises ProtocolError, ChecksumError."""
    _check(head, body)
    try:
        request: Ask | Get = _requests.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"prefix cache request refused: {error}") from None
    if count(request.groups) > MAX_NAMES:
        raise ProtocolError(f"prefix cache request of {count(request.groups)} names, {MAX_NAMES} are allowed")
    return request


def unpack_sizes(head: bytes | bytearray, body: bytes | bytearray, expected: int) -> Sequence[int]:
    """Raises ProtocolError where there are not `expected` sizes, ChecksumError."""
    _check(head, body)
    try:
        sizes = _answers.decode(body).frame_bytes
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"prefix cache answer refused: {error}") from None
    if len(sizes) != expected:
        raise ProtocolError(f"{expected} objects asked for, sizes of {len(sizes)} came")
    return sizes


def _check(head: bytes | bytearray, body: bytes | bytearray) -> None:
    if HEAD.unpack(head) != (len(body), xxhash.xxh3_64_intdigest(body)):
        raise ChecksumError(f"prefix cache message of {len(body)} bytes refused: its check is wrong")
