"""The client's exchanges: answers split at any byte, framing, broken answers, reuse. No sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.http import (
    Client,
    ClientLimits,
    ResponseHead,
    UpstreamClosedError,
    UpstreamError,
    UpstreamProtocolError,
    UpstreamStaleError,
    UpstreamTimeoutError,
)
from sglang_prfaas.http.client_connection import ClientConnection
from sglang_prfaas.http.exchange import DecodingExchange, Exchange
from tests.unit.http.http_fakes import FakeTransport

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 5\r\n\r\nhello"
CHUNKS = b"5\r\nhello\r\n3;x=1\r\n\r\n!\r\n0\r\nt: 1\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + CHUNKS
EARLY = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
CLOSED = b"HTTP/1.1 200 OK\r\n\r\nuntil the end"
EMPTY = b"HTTP/1.1 204 No Content\r\n\r\n"


class Sink:
    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.body = b""
        self.ended = 0
        self.error: UpstreamError | None = None

    def on_head(self, head: ResponseHead) -> None:
        assert self.head is None
        self.head = head

    def on_body(self, data: bytes) -> None:
        assert self.head is not None
        assert data
        self.body += data

    def on_end(self) -> None:
        self.ended += 1

    def on_failure(self, error: UpstreamError) -> None:
        assert self.error is None
        self.error = error


class Case:
    """An exchange on a fake connection."""

    def __init__(self, client: Client, *, decode: bool = False, head_request: bool = False, used: bool = False) -> None:
        self.upstream = client.upstream("http://127.0.0.1:1/base")
        self.sink = Sink()
        self.exchange = (DecodingExchange if decode else Exchange)(
            self.upstream, self.sink, head_request=head_request, first_byte_timeout_s=10, idle_timeout_s=5
        )
        client.track(self.exchange)
        self.connection = ClientConnection(self.upstream)
        self.connection.used = used
        self.transport = FakeTransport(self.connection)
        self.connection.connection_made(self.transport)
        self.connection.run(self.exchange, (b"head", b"body"))

    def feed(self, *pieces: bytes) -> Sink:
        for piece in pieces:
            if not self.transport.closed:
                self.connection.data_received(piece)
        return self.sink

    @property
    def idle(self) -> int:
        return len(self.upstream._idle)


def with_client(test: Callable[[Client], None]) -> None:
    async def main() -> None:
        client = Client(ClientLimits())
        test(client)
        await client.close()
        await asyncio.sleep(0)

    asyncio.run(main())


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


@given(
    st.sampled_from([LENGTH, CHUNKED, EMPTY]),
    st.booleans(),
    st.booleans(),
    st.lists(st.integers(0, 10_000), max_size=8),
)
def test_answers_may_be_cut_anywhere(answer: bytes, early: bool, decode: bool, places: list[int]) -> None:
    def test(client: Client) -> None:
        case = Case(client, decode=decode)
        sink = case.feed(*cut(EARLY * early + answer, places))
        assert sink.error is None
        assert sink.ended == 1
        assert sink.head is not None
        assert sink.head.status == (204 if answer is EMPTY else 200)
        decoded = {LENGTH: b"hello", CHUNKED: b"hello\r\n!", EMPTY: b""}
        raw = decoded | {CHUNKED: CHUNKS}
        assert sink.body == (decoded if decode else raw)[answer]
        assert case.idle == 1
        assert case.transport.written == b"headbody"

    with_client(test)


@given(st.lists(st.integers(0, 10_000), max_size=6), st.integers(0, len(CHUNKED) - 1))
def test_a_broken_answer_never_looks_complete(places: list[int], end: int) -> None:
    def test(client: Client) -> None:
        case = Case(client)
        case.feed(*cut(CHUNKED[:end], places))
        case.connection.connection_lost(None)
        assert case.sink.ended == 0
        assert isinstance(case.sink.error, UpstreamClosedError)

    with_client(test)


def test_an_answer_without_length_ends_with_the_connection() -> None:
    def test(client: Client) -> None:
        case = Case(client)
        case.feed(CLOSED[:25], CLOSED[25:])
        assert case.sink.ended == 0
        case.connection.connection_lost(None)
        assert case.sink.body == b"until the end"
        assert case.sink.ended == 1

    with_client(test)


def test_head_has_no_body() -> None:
    def test(client: Client) -> None:
        case = Case(client, head_request=True)
        sink = case.feed(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n")
        assert sink.ended == 1
        assert sink.head is not None
        assert sink.head.content_length == 5

    with_client(test)


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense",
        LENGTH + b"more",
        CHUNKED + b"more",
        CHUNKED + LENGTH,
        EMPTY + b"x",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * (300 << 10),
    ],
)
def test_what_is_no_answer_fails_and_closes(data: bytes) -> None:
    def test(client: Client) -> None:
        case = Case(client)
        sink = case.feed(data)
        assert isinstance(sink.error, UpstreamProtocolError)
        assert sink.ended == 0
        assert case.transport.aborted
        assert case.idle == 0

    with_client(test)


def test_connection_close_is_not_reused() -> None:
    def test(client: Client) -> None:
        case = Case(client)
        case.feed(LENGTH.replace(b"Content-Type: a/b", b"connection: close"))
        assert case.sink.ended == 1
        assert case.idle == 0
        assert case.transport.closed

    with_client(test)


def test_a_reused_connection_that_closes_unanswered_is_stale() -> None:
    def test(client: Client) -> None:
        fresh, reused, late = Case(client), Case(client, used=True), Case(client, used=True)
        late.feed(b"HTTP/1.1 2")
        for case in (fresh, reused, late):
            case.connection.connection_lost(ConnectionResetError("reset"))
        assert isinstance(fresh.sink.error, UpstreamClosedError)
        assert isinstance(reused.sink.error, UpstreamStaleError)
        assert isinstance(late.sink.error, UpstreamClosedError)

    with_client(test)


def test_cancelling_closes_and_tells_nobody() -> None:
    def test(client: Client) -> None:
        case = Case(client)
        case.feed(LENGTH[:-2])
        case.exchange.cancel()
        assert case.transport.aborted
        case.connection.connection_lost(None)
        assert case.sink.ended == 0
        assert case.sink.error is None

    with_client(test)


def test_deadlines() -> None:
    def test(client: Client) -> None:
        now_s = client.loop.time()
        waiting, moving, paused = Case(client), Case(client), Case(client)
        early = Case(client)
        early.feed(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")  # a head alone is not the first byte
        moving.feed(LENGTH[:-2])
        paused.feed(LENGTH[:-2])
        paused.exchange.pause()
        assert not paused.transport.reading
        cases = (waiting, moving, paused, early)
        for case in cases:
            case.exchange.check_deadline(now_s + 6)
        assert [type(case.sink.error) for case in cases] == [type(None), UpstreamTimeoutError, type(None), type(None)]
        for case in cases:
            case.exchange.check_deadline(now_s + 11)
        assert [bool(case.sink.error) for case in cases] == [True, True, False, True]
        assert "gave no answer within 10 s" in str(early.sink.error)
        assert waiting.transport.aborted
        paused.exchange.resume()
        assert paused.transport.reading

    with_client(test)


def test_upstream_urls() -> None:
    def test(client: Client) -> None:
        upstream = client.upstream("http://[::1]:30000/servers/a/")
        assert upstream.request_head(b"GET", b"/health", b"a: b\r\n", -1) == (
            b"GET /servers/a/health HTTP/1.1\r\nhost: [::1]:30000\r\na: b\r\n\r\n"
        )
        assert client.upstream("http://[::1]:30000/servers/a") is upstream
        assert client.upstream("https://x").port == 443
        for url in ("ftp://x", "http://", "x:1"):
            with pytest.raises(ConfigError):
                client.upstream(url)

    with_client(test)
