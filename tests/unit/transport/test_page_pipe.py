"""Memory that is sent without a copy."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from sglang_prfaas.transport import page_pipe
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.page_pipe import PIPE_BYTES, PagePipe

pytestmark = pytest.mark.skipif(not page_pipe.available(), reason="this kernel has no vmsplice, or splices that wait")


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as near,
        listener.accept()[0] as far,
    ):
        near.setblocking(False)
        far.settimeout(10.0)
        yield near, far


def read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        data += sock.recv(count - len(data))
    return data


def test_scattered_pieces_of_any_alignment(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    memory = bytearray(range(256)) * 300
    pieces = [memoryview(memory)[a:b] for a, b in ((5, 6), (4096, 9000), (1, 70_000), (4095, 4097))]
    pipe = PagePipe()
    try:
        taken = pipe.put(pieces)
        assert taken == sum(map(len, pieces))
        assert pipe.pour(near)
        assert read(far, taken) == b"".join(pieces)
    finally:
        pipe.close()
    pipe.close()


def test_copies_and_loans_keep_their_order_while_the_peer_does_not_read(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    near, far = ends
    connection = Connection(near)
    connection.may_lend()
    assert connection.lends
    memory = [bytearray([number]) * PIPE_BYTES for number in range(1, 30)]
    sent = b""
    full = False
    for number, block in enumerate(memory):
        head = f"block {number:10d}".encode()
        count = connection.send([memoryview(head)], more=True)
        if not count:
            full = True
            break
        sent += head[:count]
        lent = connection.lend([memoryview(block)])
        sent += block[:lent]
    assert full, "the socket takes it all"
    assert not connection.flush()
    got = b""
    while len(got) < len(sent):
        got += far.recv(1 << 20)
        connection.flush()
    assert got == sent
    connection.close()


def test_memory_that_cannot_be_lent_is_copied(ends: tuple[socket.socket, socket.socket]) -> None:
    near, far = ends
    connection = Connection(near)
    connection.may_lend()
    assert connection.lend([memoryview(b"read-only")]) == 9
    assert not connection.lends
    assert read(far, 9) == b"read-only"
    connection.close()


def test_both_ends_on_one_host_are_told_from_two() -> None:
    near, far = socket.socketpair()
    near.close()
    far.close()
    assert Connection(near).same_host
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=("127.0.0.1", 0)) as one,
        socket.create_connection(listener.getsockname(), source_address=("127.0.0.2", 0)) as other,
    ):
        assert Connection(one).same_host
        assert not Connection(other).same_host
