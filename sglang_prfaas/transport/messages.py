"""Control messages between a decode rank and a prefill rank, and between ranks and the bootstrap directory.

msgspec structs, encoded as MessagePack arrays tagged with the type; no pickle. Every string and list has a bound, and a
message that breaks one is refused with `ProtocolError` before anything acts on it.
"""

from __future__ import annotations

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.layout import Layout

T = TypeVar("T")

PROTOCOL_VERSION = 3
MAX_REQUEST_BYTES = 64 << 10
"""Largest message to a prefill rank or a directory, which anyone can reach."""
MAX_MESSAGE_BYTES = 1 << 20
"""Largest answer; the directory of a server with thousands of ranks needs it."""

MAX_REASON_CHARACTERS = 4096

Text = Annotated[str, Meta(max_length=MAX_REASON_CHARACTERS)]
ShortText = Annotated[str, Meta(max_length=256, pattern=r"^[^\x00-\x1f\x7f]*\Z")]
Room = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
TransferId = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Rank = Annotated[int, Meta(ge=0, lt=65536)]
Size = Annotated[int, Meta(ge=1, le=65536)]
Count = Annotated[int, Meta(ge=0, lt=1 << 31)]
PortNumber = Annotated[int, Meta(ge=1, le=65535)]
CodecName = Annotated[str, Meta(min_length=1, max_length=16, pattern=r"^[a-z0-9-]*\Z")]
Instance = Annotated[bytes, Meta(min_length=16, max_length=16)]
"""Random, of one process's mover: another one at the same place is a restarted process."""


class _Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base of all control messages."""


# --- decode rank to prefill rank --------------------------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """Opens a session: who calls, which layout it has, how many data connections it will dial."""

    version: int
    site: ShortText
    server: ShortText
    layout: Layout
    connections: Annotated[int, Meta(ge=1, le=64)]
    chunk_bytes: Annotated[int, Meta(ge=4096, le=64 << 20)]
    instance: Instance
    rank: Rank
    """Which of the server's ranks calls."""
    codecs: Annotated[tuple[CodecName, ...], Meta(max_length=16)] = ()
    """Encodings of full-attention KVCache that it can decode and takes."""
    page_tokens: Count = 0
    """What it takes the page size of the prefill server to be; 0: its own."""


class Expect(_Message, frozen=True):
    """Decode has reserved room for a request and says how many items of each component it expects."""

    transfer_id: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
    room: Room
    counts: Annotated[tuple[Count, ...], Meta(max_length=64)]
    cached_prefix_tokens: Count
    """Tokens at the start of the prompt that decode already holds; their pages are not expected."""


class Done(_Message, frozen=True):
    """Every byte expected has arrived and was checked; prefill may free the pages."""

    transfer_id: TransferId
    room: Room


class Abort(_Message, frozen=True):
    """The request ended on the decode side. Sent for a room even when no session could be opened for it."""

    room: Room
    reason: Text
    transfer_id: TransferId = 0
    """The transfer that ended; 0 where nothing had been expected yet."""


class Bye(_Message, frozen=True):
    """The session has ended on the decode side."""

    reason: Text


class Ping(_Message, frozen=True):
    """Are you there; answered by `Pong`. Acknowledges too."""


# --- prefill rank to decode rank --------------------------------------------------------------------------------------


class Welcome(_Message, frozen=True):
    """The session is open: dial the data port and begin with the token."""

    token: Annotated[bytes, Meta(min_length=16, max_length=16)]
    data_port: PortNumber
    instance: Instance
    codec: CodecName = "raw"
    """How full-attention KVCache may come: one of those of `Hello`, or raw."""
    connections: Annotated[int, Meta(ge=0, le=64)] = 0
    """Data connections to dial; 0: as many as `Hello` announced."""
    site: ShortText = ""
    """Of the prefill rank, for the settings of the link to it. Proves nothing."""


class Refuse(_Message, frozen=True):
    """The session is refused, for a reason that says both values."""

    reason: Text


class Failed(_Message, frozen=True):
    """Prefill gave a request up."""

    transfer_id: TransferId
    room: Room
    reason: Text


class Unknown(_Message, frozen=True):
    """The session of the sender is not known: the prefill rank restarted, where its instance is another than that of
    `Welcome`, or it has given the session up."""

    instance: Instance


class Redial(_Message, frozen=True):
    """A data connection does not move any more: dial it again."""

    index: Annotated[int, Meta(ge=0, lt=64)]


class Pong(_Message, frozen=True):
    """Answer to `Ping`. Acknowledges too."""


# --- bootstrap directory ----------------------------------------------------------------------------------------------


class InnerRail(_Message, frozen=True):
    """Where a prefill rank is reached by decode ranks of its own site over another mover."""

    kind: Annotated[str, Meta(min_length=1, max_length=32, pattern=r"^[a-z0-9_-]*\Z")]
    site: ShortText
    host: ShortText
    port: PortNumber


class RankInfo(_Message, frozen=True):
    """Where one prefill rank listens. An empty host means: where the directory itself was reached."""

    dp_rank: Rank
    tp_rank: Rank
    pp_rank: Rank
    host: ShortText
    control_port: PortNumber
    rail: InnerRail | None = None
    """For ranks of its own site only; a directory with keys tells no others."""


class Register(_Message, frozen=True):
    """A prefill rank announces itself; repeated until acknowledged. `boot_id` tells a restarted process apart."""

    rank: RankInfo
    boot_id: ShortText
    dp_size: Size
    tp_size: Size
    pp_size: Size
    follow_bootstrap_room: bool
    page_tokens: Count = 0
    """Tokens of one of its full-attention pages; 0: not told, as on the decode side."""


class Deregister(_Message, frozen=True):
    """A prefill rank leaves: it stops, or becomes a decode rank."""

    rank: RankInfo
    boot_id: ShortText


class Registered(_Message, frozen=True):
    """Acknowledges `Register` and `Deregister`."""


class Lookup(_Message, frozen=True):
    """A decode rank asks for the ranks behind this directory."""


class Directory(_Message, frozen=True):
    """Answer to `Lookup`. `complete` is false until every rank of the sizes given has registered."""

    complete: bool
    dp_size: Annotated[int, Meta(ge=0, le=65536)]
    tp_size: Annotated[int, Meta(ge=0, le=65536)]
    pp_size: Annotated[int, Meta(ge=0, le=65536)]
    follow_bootstrap_room: bool
    ranks: Annotated[tuple[RankInfo, ...], Meta(max_length=65536)]
    page_tokens: Count = 0
    """Of `Register`."""


ToPrefill = Hello | Expect | Done | Abort | Bye | Ping
ToDecode = Welcome | Refuse | Failed | Unknown | Redial | Pong
ToDirectory = Register | Deregister | Lookup
FromDirectory = Registered | Directory
Message = ToPrefill | ToDecode | ToDirectory | FromDirectory

_encoder = msgspec.msgpack.Encoder()
_to_prefill: msgspec.msgpack.Decoder[ToPrefill] = msgspec.msgpack.Decoder(ToPrefill)
_to_decode: msgspec.msgpack.Decoder[ToDecode] = msgspec.msgpack.Decoder(ToDecode)
_to_directory: msgspec.msgpack.Decoder[ToDirectory] = msgspec.msgpack.Decoder(ToDirectory)
_from_directory: msgspec.msgpack.Decoder[FromDirectory] = msgspec.msgpack.Decoder(FromDirectory)


def encode(message: Message) -> bytes:
    """One message as bytes."""
    return _encoder.encode(message)


def reason_text(text: str) -> str:
    """A reason as a message may carry it: encodable, and of bounded length."""
    return text.encode("utf-8", "replace").decode()[:MAX_REASON_CHARACTERS]


def _decode(decoder: msgspec.msgpack.Decoder[T], data: bytes, max_bytes: int = MAX_MESSAGE_BYTES) -> T:
    if len(data) > max_bytes:
        raise ProtocolError(f"control message of {len(data)} bytes, at most {max_bytes} are allowed")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"control message refused: {error}") from None


def decode_to_prefill(data: bytes) -> ToPrefill:
    """Parse what a decode rank sent. Raises ProtocolError."""
    return _decode(_to_prefill, data, MAX_REQUEST_BYTES)


def decode_to_decode(data: bytes) -> ToDecode:
    """Parse what a prefill rank sent. Raises ProtocolError."""
    return _decode(_to_decode, data)


def decode_to_directory(data: bytes) -> ToDirectory:
    """Parse what a rank sent to the directory. Raises ProtocolError."""
    return _decode(_to_directory, data, MAX_REQUEST_BYTES)


def decode_from_directory(data: bytes) -> FromDirectory:
    """Parse what the directory answered. Raises ProtocolError."""
    return _decode(_from_directory, data)
