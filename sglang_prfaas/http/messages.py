"""Values of HTTP messages: requests, response heads, framing, header rules. No I/O.

Header names are lower-case bytes, values are bytes as received; a header list keeps its order and duplicates.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from http import HTTPStatus
from urllib.parse import unquote

Headers = list[tuple[bytes, bytes]]

# RFC 9110 section 7.6.1, and what curl and old proxies send.
HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
# Set anew for every upstream request.
_REQUEST_OWN = HOP_BY_HOP | {b"host", b"content-length", b"expect"}

_NOTHING: frozenset[bytes] = frozenset()
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}


class Framing(Enum):
    """How a message body's end is marked."""

    NONE = "no body"
    LENGTH = "content-length"
    CHUNKED = "chunked"
    CLOSE = "until close"


class _Message:
    """What requests and answers share."""

    __slots__ = ("headers",)

    def __init__(self, headers: Headers) -> None:
        self.headers = headers

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header (lower-case name), or None."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


class Request(_Message):
    """One complete request of a client."""

    __slots__ = ("body", "http_1_1", "keep_alive", "method", "path", "peer", "query", "target")

    def __init__(
        self,
        method: str,
        target: bytes,
        headers: Headers,
        body: bytes = b"",
        *,
        http_1_1: bool = True,
        keep_alive: bool = True,
        peer: str = "",
    ) -> None:
        super().__init__(headers)
        self.method = method
        self.target = target  # as received, without scheme and authority
        path, _, self.query = target.partition(b"?")
        self.path = unquote(path) if b"%" in path else path.decode("latin-1")
        self.body = body
        self.http_1_1 = http_1_1
        self.keep_alive = keep_alive
        self.peer = peer

    def __repr__(self) -> str:
        return f"Request({self.method} {self.path}, {len(self.body)} bytes)"


class ResponseHead(_Message):
    """Status line and headers of a server's answer."""

    __slots__ = ("content_length", "framing", "status")

    def __init__(self, status: int, headers: Headers, framing: Framing, content_length: int = 0) -> None:
        super().__init__(headers)
        self.status = status
        self.framing = framing
        self.content_length = content_length

    def __repr__(self) -> str:
        return f"ResponseHead({self.status}, {self.framing.value})"


def strip_authority(target: bytes) -> bytes:
    """Origin form of an absolute-form target: `http://host/path` gives `/path`."""
    if target.startswith(b"/") or b"://" not in target:
        return target
    slash = target.find(b"/", target.index(b"://") + 3)
    return target[slash:] if slash >= 0 else b"/"


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Headers that a Connection header declares hop-by-hop."""
    named = _NOTHING
    for name, value in headers:
        if name == b"connection":
            named |= frozenset(token.strip().lower() for token in value.split(b","))
    return named


def forwardable_request_headers(headers: Headers, drop_prefixes: tuple[bytes, ...] = ()) -> Headers:
    """Headers that go on to an upstream: no hop-by-hop ones, none that we set ourselves, none of `drop_prefixes`."""
    named = _named_by_connection(headers)
    return [
        item
        for item in headers
        if item[0] not in _REQUEST_OWN
        and item[0] not in named
        and not (drop_prefixes and item[0].startswith(drop_prefixes))
    ]


def forwardable_response_headers(headers: Headers) -> Headers:
    """Headers of an upstream's answer that go on to the client; framing headers are set anew."""
    named = _named_by_connection(headers)
    return [
        item for item in headers if item[0] not in HOP_BY_HOP and item[0] != b"content-length" and item[0] not in named
    ]


def encode_headers(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header lines, without the empty line that ends a head."""
    return b"".join([b"%b: %b\r\n" % item for item in headers])


def status_line(status: int) -> bytes:
    """The status line, with an empty reason for codes unknown to the standard library."""
    return _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def encode_request_head(method: bytes, target: bytes, authority: bytes, header_block: bytes, body_bytes: int) -> bytes:
    """A complete request head. `header_block` comes from `encode_headers`; `body_bytes` below zero means no body."""
    length = b"content-length: %d\r\n" % body_bytes if body_bytes >= 0 else b""
    return b"%b %b HTTP/1.1\r\nhost: %b\r\n%b%b\r\n" % (method, target, authority, header_block, length)


def safe_header_value(text: str) -> bytes:
    """`text` as a header value: what is not printable ASCII becomes `?`, so no line can be injected."""
    if text.isascii() and text.isprintable():
        return text.encode("ascii")
    return "".join(c if " " <= c <= "~" else "?" for c in text).encode("ascii")
