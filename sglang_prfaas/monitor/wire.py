"""Reports and commands as bytes: MessagePack, one message a frame, told apart by a tag.

A router dials an agent (ZeroMQ DEALER to ROUTER), and subscribes again and again. Up go `Report`s, down `Request`s.
"""

from __future__ import annotations

import msgspec

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.monitor.reports import Report, Request

MAX_REPORT_BYTES = 16 << 20
"""A report of 1,000 servers has about 0.2 MB."""

_encoder = msgspec.msgpack.Encoder()
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)


def encode(message: Report | Request) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode_report(data: bytes) -> Report:
    """What an agent sent. Raises ProtocolError."""
    try:
        return _reports.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ProtocolError(f"a report that is none, of {len(data)} bytes: {error}") from None


def decode_request(data: bytes) -> Request:
    """What a router sent. Raises ProtocolError."""
    try:
        return _requests.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ProtocolError(f"a request that is none, of {len(data)} bytes: {error}") from None
