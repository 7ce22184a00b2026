"""Ends of the wire that do what they are told, right or wrong: raw control messages and raw data connections."""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import Any

import zmq

from sglang_prfaas.transport.addresses import endpoint
from sglang_prfaas.transport.framing import PREFACE, ChunkHeader, Preface, pack_chunk
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.mailbox import seal, unseal
from sglang_prfaas.transport.messages import (
    PROTOCOL_VERSION,
    Hello,
    Message,
    Welcome,
    decode_to_decode,
    decode_to_prefill,
    encode,
)
from tests.transport.rig import DEADLINE_S

INSTANCE = b"0" * 16
TOKEN = b"0123456789abcdef"


def chunk(transfer_id: int, component: int, buffer: int, offset: int, payload: bytes) -> bytes:
    return pack_chunk(ChunkHeader(transfer_id, component, buffer, offset, len(payload)), payload)


def reset(sock: socket.socket) -> None:
    """Break a connection the hard way: the peer gets a RST."""
    unspecified = struct.pack("H14x", socket.AF_UNSPEC)
    ctypes.CDLL(None, use_errno=True).connect(sock.fileno(), unspecified, len(unspecified))


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, f"closed after {len(data)} of {count} bytes"
        data += more
    return data


def at_end(sock: socket.socket) -> bool:
    """Whether the peer closes the connection. Raises TimeoutError where it does not."""
    sock.settimeout(DEADLINE_S)
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


class _Fake:
    """A context, sockets, and deadlines on everything."""

    def __init__(self) -> None:
        self.context = zmq.Context()
        self.sockets: list[socket.socket] = []

    def control(self, kind: int) -> zmq.Socket[bytes]:
        sock = self.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        return sock

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.sockets:
            sock.close()
        self.context.destroy(linger=0)


class FakePrefill(_Fake):
    """A prefill rank under the test's control."""

    def __init__(self, control_port: int = 0) -> None:
        super().__init__()
        self.router = self.control(zmq.ROUTER)
        self.router.bind(endpoint("127.0.0.1", control_port))
        self.control_port = int(self.router.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(DEADLINE_S)
        self.sockets.append(self.listener)
        self.data_port: int = self.listener.getsockname()[1]
        self.identity = b""

    def receive(self, kind: type[Any]) -> Any:
        """The next message of a kind; others before it are passed over."""
        while True:
            self.identity, data = self.router.recv_multipart()
            message = decode_to_prefill(unseal(data)[2])
            if isinstance(message, kind):
                return message

    def send(self, message: Message | bytes) -> None:
        data = message if isinstance(message, bytes) else encode(message)
        self.router.send_multipart([self.identity, seal(data)])

    def welcome(self) -> list[socket.socket]:
        """Let a decode rank in; returns its data connections, by index."""
        hello = self.receive(Hello)
        self.send(Welcome(TOKEN, self.data_port, INSTANCE))
        return self.accept(hello.connections)

    def accept(self, connections: int) -> list[socket.socket]:
        """The next data connections, by index."""
        found: dict[int, socket.socket] = {}
        for _ in range(connections):
            sock, _ = self.listener.accept()
            sock.settimeout(DEADLINE_S)
            self.sockets.append(sock)
            _, _, index, got = PREFACE.unpack(read_exactly(sock, PREFACE.size))
            assert got == TOKEN
            found[index] = sock
        return [found[index] for index in sorted(found)]


class FakeDecode(_Fake):
    """A decode rank under the test's control."""

    def __init__(self, control_port: int, identity: bytes = b"Dfake") -> None:
        super().__init__()
        self.dealer = self.control(zmq.DEALER)
        self.dealer.setsockopt(zmq.ROUTING_ID, identity)
        self.dealer.connect(endpoint("127.0.0.1", control_port))

    def send(self, message: Message | bytes) -> None:
        self.dealer.send(seal(message if isinstance(message, bytes) else encode(message)))

    def receive(self, kind: type[Any]) -> Any:
        """The next message of a kind; others before it are passed over."""
        while True:
            message = decode_to_decode(unseal(self.dealer.recv())[2])
            if isinstance(message, kind):
                return message

    def hello(self, layout: Layout, connections: int = 1, chunk_bytes: int = 4096) -> None:
        self.send(Hello(PROTOCOL_VERSION, "pd", "fake", layout, connections, chunk_bytes, INSTANCE, 0))

    def connect(self, data_port: int, first_bytes: bytes) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", data_port), timeout=DEADLINE_S)
        self.sockets.append(sock)
        sock.sendall(first_bytes)
        return sock

    def open(self, layout: Layout, connections: int = 1) -> list[socket.socket]:
        """A whole session."""
        self.hello(layout, connections)
        welcome = self.receive(Welcome)
        return [self.connect(welcome.data_port, Preface(i, welcome.token).pack()) for i in range(connections)]
