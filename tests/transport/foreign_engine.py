"""Both ends of the wire as another engine would write them, from docs/protocol.md alone: nothing of the mover is
imported here, and every number below stands in that document."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import xxhash
import zmq

Items = Sequence[Sequence[bytes]]
"""`[buffer][item]` of one component."""

PROTOCOL_VERSION = DATA_VERSION = 3
RELIABLE = {"Expect", "Done", "Abort", "Bye", "Failed", "Redial"}
HEADER_BYTES, TRAILER_BYTES, RECEIPT_BYTES, PREFACE_BYTES = 32, 8, 16, 24


def h64(data: bytes, seed: int = 0) -> int:
    return int(xxhash.xxh3_64_intdigest(data, seed=seed))


# --- control messages -------------------------------------------------------------------------------------------------


class Envelopes:
    """Numbers what has to arrive, and acknowledges."""

    def __init__(self) -> None:
        self.posted = self.received = 0

    def seal(self, name: str, *fields: Any) -> bytes:
        number = 0
        if name in RELIABLE:
            self.posted += 1
            number = self.posted
        body = msgspec.msgpack.encode([name, *fields])
        numbers = struct.pack(">QQ", number, self.received)
        return numbers + struct.pack(">Q", h64(numbers + body)) + body

    def open(self, data: bytes) -> list[Any] | None:
        """Name and fields; None for what came before."""
        number, acknowledged, check = struct.unpack_from(">QQQ", data)
        assert check == h64(data[:16] + data[24:])
        assert acknowledged <= self.posted
        if number:
            if number != self.received + 1:
                return None
            self.received = number
        found = msgspec.msgpack.decode(data[24:])
        assert isinstance(found, list)
        return found


def layout(components: Iterable[tuple[str, Sequence[int]]], **values: Any) -> dict[str, Any]:
    return {
        **values,
        "components": [{"name": name, "item_bytes": list(sizes), "shardings": []} for name, sizes in components],
    }


# --- data connections -------------------------------------------------------------------------------------------------


def preface(index: int, token: bytes) -> bytes:
    return b"PFD1" + struct.pack(">HH", DATA_VERSION, index) + token


def chunk(transfer_id: int, component: int, buffer: int, offset: int, payload: bytes) -> bytes:
    head = b"PFC1" + struct.pack(">HHQQI", component, buffer, transfer_id, offset, len(payload))
    seed = h64(head)
    return head + struct.pack(">I", seed & 0xFFFFFFFF) + payload + struct.pack(">Q", h64(payload, seed))


def receipt(number: int, *, again: bool = False) -> bytes:
    magic = b"PFX1" if again else b"PFA1"
    return magic + struct.pack(">IQ", h64(magic + struct.pack(">Q", number)) & 0xFFFFFFFF, number)


def exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        assert more, f"closed after {len(data)} of {count} bytes"
        data += more
    return data


def read_chunk(sock: socket.socket) -> tuple[int, int, int, int, bytes]:
    """Transfer id, component, buffer, offset, payload."""
    head = exactly(sock, HEADER_BYTES)
    assert head[:4] == b"PFC1", head
    component, buffer, transfer_id, offset, length = struct.unpack_from(">HHQQI", head, 4)
    (head_check,) = struct.unpack_from(">I", head, 28)
    seed = h64(head[:28])
    assert head_check == seed & 0xFFFFFFFF
    payload = exactly(sock, length)
    assert struct.unpack(">Q", exactly(sock, TRAILER_BYTES)) == (h64(payload, seed),)
    return transfer_id, component, buffer, offset, payload


# --- the two ends -----------------------------------------------------------------------------------------------------


class _End:
    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.context = zmq.Context()
        self.envelopes = Envelopes()
        self.socks: list[socket.socket] = []

    def control(self, kind: int) -> Any:
        sock = self.context.socket(kind)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, int(self.timeout_s * 1000))
        return sock

    def close(self) -> None:
        for sock in self.socks:
            sock.close()
        self.context.destroy(linger=0)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ForeignDecode(_End):
    """A decode rank with two data connections."""

    def __init__(self, host: str, control_port: int, own: dict[str, Any], timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.own = own
        self.dealer = self.control(zmq.DEALER)
        self.dealer.setsockopt(zmq.ROUTING_ID, b"D" + os.urandom(15))
        self.dealer.connect(f"tcp://{host}:{control_port}")
        hello = (PROTOCOL_VERSION, "pd", "foreign-0", own, 2, 65536, os.urandom(16), 0)
        self.dealer.send(self.envelopes.seal("Hello", *hello))
        token, data_port, *_ = self.hear("Welcome")
        for index in range(2):
            self.socks.append(socket.create_connection((host, data_port), timeout_s))
            self.socks[-1].sendall(preface(index, token))

    def hear(self, name: str) -> list[Any]:
        """The fields of the next message of a name."""
        while True:
            message = self.envelopes.open(self.dealer.recv())
            if message is not None:
                assert message[0] != "Refuse", message
                if message[0] == name:
                    return message[1:]

    def request(self, room: int, counts: Sequence[int]) -> list[list[list[bytes]]]:
        """Every item of a request, `[component][buffer][item]`, taken over both connections."""
        self.dealer.send(self.envelopes.seal("Expect", 1, room, list(counts), 0))
        sizes = [component["item_bytes"] for component in self.own["components"]]
        streams = {
            (c, b): bytearray(size * counts[c]) for c, buffers in enumerate(sizes) for b, size in enumerate(buffers)
        }
        missing = sum(map(len, streams.values()))
        handled = [0, 0]
        while missing:
            for index, sock in enumerate(self.socks):
                sock.settimeout(0.05)
                try:
                    first = sock.recv(1, socket.MSG_PEEK)
                except TimeoutError:
                    continue
                assert first, "closed"
                sock.settimeout(self.timeout_s)
                transfer_id, component, buffer, offset, payload = read_chunk(sock)
                assert transfer_id == 1
                streams[component, buffer][offset : offset + len(payload)] = payload
                missing -= len(payload)
                handled[index] += 1
                sock.sendall(receipt(handled[index]))
        self.dealer.send(self.envelopes.seal("Done", 1, room))
        return [
            [[bytes(streams[c, b][i * size : (i + 1) * size]) for i in range(counts[c])] for b, size in enumerate(row)]
            for c, row in enumerate(sizes)
        ]


class ForeignPrefill(_End):
    """A prefill rank."""

    TOKEN, INSTANCE = os.urandom(16), os.urandom(16)

    def __init__(self, timeout_s: float) -> None:
        super().__init__(timeout_s)
        self.router = self.control(zmq.ROUTER)
        self.control_port: int = self.router.bind_to_random_port("tcp://127.0.0.1")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(timeout_s)
        self.socks.append(self.listener)
        self.peer = b""
        self.chunk_bytes = 0

    def hear(self, name: str) -> list[Any]:
        """The fields of the next message of a name; answers `Ping` meanwhile."""
        while True:
            self.peer, data = self.router.recv_multipart()
            message = self.envelopes.open(data)
            if message is None:
                continue
            if message[0] == "Ping":
                self.say("Pong")
            if message[0] == name:
                return message[1:]

    def say(self, name: str, *fields: Any) -> None:
        self.router.send_multipart([self.peer, self.envelopes.seal(name, *fields)])

    def open(self) -> list[socket.socket]:
        """A session; returns its data connections."""
        version, _site, _server, _layout, connections, self.chunk_bytes, *_ = self.hear("Hello")
        assert version == PROTOCOL_VERSION
        self.say("Welcome", self.TOKEN, self.listener.getsockname()[1], self.INSTANCE)
        found: dict[int, socket.socket] = {}
        while len(found) < connections:
            sock, _ = self.listener.accept()
            sock.settimeout(self.timeout_s)
            self.socks.append(sock)
            said = exactly(sock, PREFACE_BYTES)
            index = struct.unpack_from(">H", said, 6)[0]
            assert said == preface(index, self.TOKEN)
            found[index] = sock
        return [found[index] for index in sorted(found)]

    def serve(self, socks: Sequence[socket.socket], components: Sequence[Items]) -> int:
        """Send what decode expects, a chunk an item or a part of one, in turn over the connections; the first is sent
        corrupt once. Returns the room."""
        transfer_id, room, counts, cached = self.hear("Expect")
        assert cached == 0
        assert counts == [len(buffers[0]) if buffers else 0 for buffers in components]
        spans = [
            (component, buffer, number * len(item) + at, item[at : at + self.chunk_bytes])
            for component, buffers in enumerate(components)
            for buffer, items in enumerate(buffers)
            for number, item in enumerate(items)
            for at in range(0, len(item), self.chunk_bytes)
        ]
        wires = [chunk(transfer_id, *span) for span in spans]
        sent = [0] * len(socks)
        socks[0].sendall(wires[0][:-1] + bytes([wires[0][-1] ^ 1]))
        assert exactly(socks[0], RECEIPT_BYTES) == receipt(0, again=True)
        sent[0] += 1
        for number, wire in enumerate(wires):
            index = number % len(socks)
            socks[index].sendall(wire)
            sent[index] += 1
        for sock, count in zip(socks, sent, strict=True):
            while exactly(sock, RECEIPT_BYTES) != receipt(count):
                pass  # those before
        done = self.hear("Done")
        assert done == [transfer_id, room]
        return int(room)
