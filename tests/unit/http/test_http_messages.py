"""Header rules and chunk scanning."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.errors import ProtocolError
from sglang_prfaas.http.chunks import LAST_CHUNK, ChunkScanner, complete_chunks_length, encode_chunk
from sglang_prfaas.http.messages import (
    Request,
    forwardable_request_headers,
    forwardable_response_headers,
    safe_header_value,
    strip_authority,
)


def test_hop_by_hop_headers_stay_behind() -> None:
    headers = [
        (b"host", b"x"),
        (b"connection", b"close, X-Private"),
        (b"x-private", b"1"),
        (b"te", b"trailers"),
        (b"content-length", b"5"),
        (b"expect", b"100-continue"),
        (b"authorization", b"Bearer k"),
        (b"x-override-rid", b"1"),
        (b"cookie", b"a"),
        (b"cookie", b"b"),
    ]
    kept = forwardable_request_headers(headers, (b"x-override-",))
    assert kept == [(b"authorization", b"Bearer k"), (b"cookie", b"a"), (b"cookie", b"b")]
    assert (b"x-override-rid", b"1") in forwardable_request_headers(headers)
    answer = [(b"transfer-encoding", b"chunked"), (b"content-type", b"a"), (b"keep-alive", b"1"), (b"date", b"d")]
    assert forwardable_response_headers(answer) == [(b"content-type", b"a"), (b"date", b"d")]


def test_targets() -> None:
    assert strip_authority(b"/a://b") == b"/a://b"
    assert strip_authority(b"http://host:1/a?b") == b"/a?b"
    assert strip_authority(b"http://host") == b"/"
    request = Request("GET", b"/a%2Fb?c=%20", [(b"a", b"1"), (b"a", b"2")])
    assert (request.path, request.query, request.header(b"a"), request.header(b"b")) == ("/a/b", b"c=%20", b"1", None)


@given(st.text())
def test_no_header_value_can_start_a_line(text: str) -> None:
    value = safe_header_value(text)
    assert not set(value) & {0, 10, 13}
    assert len(value) == len(text)


chunks = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


@given(chunks, st.lists(st.integers(0, 1000), max_size=6), st.binary(max_size=5))
def test_chunks_scanned_at_any_cut(payloads: list[bytes], places: list[int], after: bytes) -> None:
    stream = b"".join(encode_chunk(p) for p in payloads) + LAST_CHUNK
    edges = [0, *sorted(p % (len(stream) + 1) for p in places), len(stream)]
    scanner = ChunkScanner()
    decoded = b""
    for a, b in pairwise(edges):
        payload, boundary = scanner.feed(stream[a:b])
        decoded += payload
        whole = [0]
        for p in payloads:
            whole.append(whole[-1] + len(encode_chunk(p)))
        inside = [edge for edge in [*whole, len(stream)] if a < edge <= b]
        assert boundary == (inside[-1] - a if inside else 0)
    assert decoded == b"".join(payloads)
    assert scanner.finished
    assert scanner.feed(after) == (b"", 0)


@given(chunks, st.integers(0, 300))
def test_complete_chunks(payloads: list[bytes], end: int) -> None:
    encoded = [encode_chunk(p) for p in payloads]
    stream = (b"".join(encoded) + LAST_CHUNK)[:end]
    expected = 0
    for chunk in encoded:
        if expected + len(chunk) > len(stream):
            break
        expected += len(chunk)
    assert complete_chunks_length(stream) == expected


@pytest.mark.parametrize("data", [b"zz\r\n", b"\r\n", b"-1\r\n", b"1\r\nab\r\n", b"11111111111111111\r\n"])
def test_what_are_no_chunks(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        ChunkScanner().feed(data)
