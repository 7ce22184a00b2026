"""What a gateway and the site that dials it say to each other: control messages over ZeroMQ, and one preface.

site that dials out                     gateway, in the decode site
  Offer ----------------------------------> every OFFER_S: I am here
                                <---------- Open (token, port): somebody has connected to this port of mine
  dials its own server's port, and the port after the gateway's
  preface "PFB1" token ===================> from here on the bytes of that connection, both ways
  Refused (token) ------------------------> or: nothing listens there
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.transport.messages import PortNumber, ShortText

OFFER_S = 1.0
VERSION = 2
PREFACE = struct.Struct(">4s16s")
PREFACE_MAGIC = b"PFB1"

Token = Annotated[bytes, Meta(min_length=16, max_length=16)]


class _Message(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """Base."""


class Offer(_Message, frozen=True):
    """A site can be reached through whoever says this."""

    version: int
    site: ShortText


class Open(_Message, frozen=True):
    """Connect to a port of your site, and to me with the token."""

    token: Token
    port: PortNumber


class Refused(_Message, frozen=True):
    """That port cannot be had."""

    token: Token
    reason: ShortText
    closed: bool = False
    """Nothing listens there."""


_encoder = msgspec.msgpack.Encoder()
_to_gateway: msgspec.msgpack.Decoder[Offer | Refused] = msgspec.msgpack.Decoder(Offer | Refused)
_from_gateway: msgspec.msgpack.Decoder[Open] = msgspec.msgpack.Decoder(Open)


def encode(message: Offer | Open | Refused) -> bytes:
    """Bytes of a message."""
    return _encoder.encode(message)


def decode_to_gateway(data: bytes) -> Offer | Refused:
    """Raises ProtocolError."""
    try:
        return _to_gateway.decode(data)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"message to the gateway refused: {error}") from None


def decode_from_gateway(data: bytes) -> Open:
    """Raises ProtocolError."""
    try:
        return _from_gateway.decode(data)
    except msgspec.DecodeError as error:
        raise ProtocolError(f"message of the gateway refused: {error}") from None
