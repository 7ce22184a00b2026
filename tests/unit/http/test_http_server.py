"""The server's protocol: requests split at any byte, pipelining, limits, refusals. No sockets."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.http import Framing, HttpError, HttpServer, Request, Response, ServerLimits
from sglang_prfaas.http.server_connection import ServerConnection
from tests.unit.http.http_fakes import FakeTransport

POST = b"POST /a?b=1 HTTP/1.1\r\nHost: x\r\nX-Name:  v \r\ncontent-length: 5\r\n\r\nhello"
CHUNKED = (
    b"PUT /c HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nt: 1\r\n\r\n"
)
GET = b"GET http://x/d HTTP/1.1\r\nhost: x\r\n\r\n"


async def echo(request: Request, response: Response) -> None:
    text = f"{request.method} {request.path} {request.query.decode()} {request.header(b'x-name')!r} ".encode()
    response.send(200, text + request.body)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def serve(pieces: list[bytes], handler: object = echo, **limits: int) -> FakeTransport:
    """Feed pieces to a fresh connection; returns its transport."""
    server = HttpServer(handler, ServerLimits(**limits))  # type: ignore[arg-type]
    connection = ServerConnection(server)
    transport = FakeTransport(connection)
    connection.connection_made(transport)
    for piece in pieces:
        if transport.closed:
            break
        connection.data_received(piece)
    await settle()
    await server.close()
    await settle()
    return transport


def answers(written: bytes) -> list[bytes]:
    """Bodies of answers with a content-length."""
    bodies = []
    while written:
        head, _, rest = written.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        bodies.append(rest[:length])
        written = rest[length:]
    return bodies


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in places), len(data)]
    return [data[a:b] for a, b in pairwise(edges) if a < b]


@given(st.lists(st.integers(0, 10_000), max_size=8), st.permutations([POST, CHUNKED, GET]))
def test_requests_may_be_cut_anywhere_and_are_answered_in_order(places: list[int], order: list[bytes]) -> None:
    expected = {
        POST: b"POST /a b=1 b'v' hello",
        CHUNKED: b"PUT /c  None abcde",
        GET: b"GET /d  None ",
    }
    written = asyncio.run(serve(cut(b"".join(order), places))).written
    assert answers(written) == [expected[request] for request in order]


def test_every_single_cut() -> None:
    stream = POST + CHUNKED
    for place in range(len(stream)):
        assert len(answers(asyncio.run(serve([stream[:place], stream[place:]])).written)) == 2


def test_pipelined_requests_wait_for_the_first() -> None:
    async def main() -> None:
        gate = asyncio.Event()
        running: list[str] = []

        async def handler(request: Request, response: Response) -> None:
            running.append(request.path)
            await gate.wait()
            await echo(request, response)

        server = HttpServer(handler)
        connection = ServerConnection(server)
        transport = FakeTransport(connection)
        connection.connection_made(transport)
        connection.data_received(POST + GET)
        await settle()
        assert running == ["/a"]
        states = [transport.reading]
        gate.set()
        await settle()
        assert running == ["/a", "/d"]
        assert [*states, transport.reading] == [False, True]
        assert len(answers(transport.written)) == 2
        await server.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 3\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3\r\ncontent-length: 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3, 3\r\n\r\nabc", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", 400),
        (b"POST / HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\nhost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost : x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\n folded\r\n\r\n", 400),
        (b"GET / HTTP/1.1\nhost: x\n\n", 400),
        (b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00", 400),
        (b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 101\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n65\r\n" + b"x" * 101, 413),
        (b"GET / HTTP/1.1\r\nhost: x\r\na: " + b"x" * 300, 431),
        (b"GET /" + b"x" * 300, 431),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 201 + b"\r\n", 431),
    ],
)
def test_refusals_are_answered_and_the_connection_ends(data: bytes, status: int) -> None:
    handled: list[Request] = []

    async def handler(request: Request, response: Response) -> None:
        handled.append(request)
        response.send(200)

    transport = asyncio.run(serve([data], handler, max_body_bytes=100, max_header_bytes=200 if status == 431 else 4000))
    head, _, body = transport.written.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in head
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert transport.eof_written
    assert not handled


def test_expect_100_continue_is_answered_before_the_body() -> None:
    async def main() -> None:
        server = HttpServer(echo, ServerLimits(max_body_bytes=100))
        for length, first in ((5, b"HTTP/1.1 100 Continue\r\n\r\n"), (500, b"HTTP/1.1 413 ")):
            connection = ServerConnection(server)
            transport = FakeTransport(connection)
            connection.connection_made(transport)
            connection.data_received(
                b"POST / HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n" % length
            )
            assert transport.written.startswith(first)
        await server.close()

    asyncio.run(main())


def test_keep_alive_and_http_1_0() -> None:
    one = asyncio.run(serve([b"GET / HTTP/1.0\r\n\r\n"]))
    assert b"connection: close" in one.written
    assert one.closed
    two = asyncio.run(serve([b"GET / HTTP/1.0\r\nconnection: keep-alive\r\n\r\n" * 2]))
    assert two.written.count(b"connection: keep-alive") == 2
    three = asyncio.run(serve([b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" + GET]))
    assert three.written.count(b"HTTP/1.1 200") == 1


def test_streams_for_1_1_1_0_and_head() -> None:
    async def stream(request: Request, response: Response) -> None:
        response.start(200, [(b"a", b"b")], Framing.CHUNKED)
        response.write(b"one")
        await response.drain()
        response.write(b"")
        response.write(b"two")
        response.end()

    async def raw(request: Request, response: Response) -> None:
        response.start(200, [], Framing.CHUNKED, raw=True)
        response.write(b"3\r\none\r\n3\r")
        response.write(b"\ntwo\r\n0\r\n\r\n")
        response.end()

    for handler in (stream, raw):
        written = asyncio.run(serve([GET], handler)).written
        assert b"transfer-encoding: chunked" in written
        assert written.endswith(b"\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        transport = asyncio.run(serve([b"GET / HTTP/1.0\r\n\r\n"], handler))
        assert transport.written.endswith(b"\r\n\r\nonetwo")
        assert b"chunked" not in transport.written
        assert transport.closed
        head = asyncio.run(serve([b"HEAD / HTTP/1.1\r\nhost: x\r\n\r\n"], handler)).written
        assert head.endswith(b"\r\n\r\n")
        assert head.count(b"\r\n\r\n") == 1


def test_a_client_that_leaves_cancels_its_handler() -> None:
    async def main() -> None:
        ended: list[str] = []

        async def handler(request: Request, response: Response) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

        server = HttpServer(handler)
        connection = ServerConnection(server)
        transport = FakeTransport(connection)
        connection.connection_made(transport)
        connection.data_received(GET)
        await settle()
        assert connection.eof_received() is False
        transport.close()
        await settle()
        assert ended == ["cancelled"]
        assert server.connections == 0

    asyncio.run(main())


def test_faults_of_a_handler_become_errors(caplog: pytest.LogCaptureFixture) -> None:
    async def refuses(request: Request, response: Response) -> None:
        raise HttpError(418, "no coffee", code="teapot", param="pot", headers=((b"x-pot", b"1"),))

    async def breaks(request: Request, response: Response) -> None:
        raise ValueError("inner secret")

    async def breaks_late(request: Request, response: Response) -> None:
        response.start(200, [], Framing.LENGTH, content_length=10)
        response.write(b"half")
        raise ValueError("inner secret")

    async def forgets(request: Request, response: Response) -> None:
        pass

    written = asyncio.run(serve([GET], refuses)).written
    assert b"x-pot: 1\r\n" in written
    error = json.loads(answers(written)[0])["error"]
    assert error == {"message": "no coffee", "type": "invalid_request_error", "param": "pot", "code": "teapot"}
    for handler in (breaks, forgets):
        written = asyncio.run(serve([GET], handler)).written
        assert written.startswith(b"HTTP/1.1 500 ")
        assert b"secret" not in written
    assert asyncio.run(serve([GET], breaks_late)).aborted
    assert "inner secret" in caplog.text


def test_pausing_reaches_whoever_writes() -> None:
    async def main() -> None:
        calls: list[str] = []

        async def handler(request: Request, response: Response) -> None:
            response.set_flow(lambda: calls.append("pause"), lambda: calls.append("resume"))
            await asyncio.Event().wait()

        server = HttpServer(handler)
        connection = ServerConnection(server)
        connection.connection_made(FakeTransport(connection))
        connection.data_received(GET)
        await settle()
        connection.pause_writing()
        connection.resume_writing()
        assert calls == ["pause", "resume"]
        await server.close()

    asyncio.run(main())


def test_connections_above_the_limit_are_told_so() -> None:
    async def main() -> None:
        server = HttpServer(echo, ServerLimits(max_connections=1))
        first, second = ServerConnection(server), ServerConnection(server)
        first.connection_made(FakeTransport(first))
        transport = FakeTransport(second)
        second.connection_made(transport)
        assert transport.written.startswith(b"HTTP/1.1 503 ")
        assert b"too_busy" in transport.written
        await server.close()

    asyncio.run(main())


@pytest.mark.parametrize("head", [b"POST /a HTTP/1.1\r\nx-slow: ", POST.replace(b": 5", b": 500000")])
def test_a_request_that_trickles_in_is_ended(head: bytes) -> None:
    """Byte by byte, each well before the last one's time is over: nobody holds a connection so."""

    async def main() -> None:
        server = HttpServer(echo, ServerLimits(keepalive_timeout_s=0.3))
        await server.start("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(head)
        answer = asyncio.ensure_future(reader.read())
        async with asyncio.timeout(60):
            while not answer.done():
                writer.write(b"a")
                await asyncio.sleep(0.02)
        assert answer.result().startswith(b"HTTP/1.1 408 ")
        assert b"request_timeout" in answer.result()
        writer.close()
        await server.close()

    asyncio.run(main())


def test_an_upload_that_moves_is_not_cut() -> None:
    async def main() -> None:
        server = HttpServer(echo, ServerLimits(keepalive_timeout_s=60.0))
        connection = ServerConnection(server)
        transport = FakeTransport(connection)
        connection.connection_made(transport)
        connection.data_received(POST.replace(b": 5", b": 1000005"))
        for _ in range(1000):
            connection.data_received(b"a" * 1000)
        await settle()
        assert transport.written.startswith(b"HTTP/1.1 200 ")
        await server.close()

    asyncio.run(main())


def test_an_idle_connection_is_closed_without_a_word() -> None:
    async def main() -> None:
        server = HttpServer(echo, ServerLimits(keepalive_timeout_s=0.05))
        await server.start("127.0.0.1", 0)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        async with asyncio.timeout(60):
            assert await reader.read() == b""
        writer.close()
        await server.close()

    asyncio.run(main())
