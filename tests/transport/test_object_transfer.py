"""Objects of a prefix cache between sites over real sockets: with keys and without, and peers that misbehave."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.clock import Deadline, MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ConfigError, DeadlineError, PeerError, PeerGoneError, PortRefusedError, ProtocolError
from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.objects import head_bytes, is_intact
from sglang_prfaas.store.stats import Counters
from sglang_prfaas.transport import object_server
from sglang_prfaas.transport.object_client import ObjectClient
from sglang_prfaas.transport.object_messages import HEAD, OBJECT_LENGTH, Ask, Get, Sizes, pack
from sglang_prfaas.transport.object_server import ObjectServer
from sglang_prfaas.transport.security import load_security

from .keyring import Keyring, Relay
from .relay import FaultyRelay
from .rig import CONFIG, wait_until

KEYS = tuple(f"{number:064x}" for number in range(40))
GROUPS = (("d/kv", KEYS),)
PAYLOAD_BYTES = 100_000
SIZE = head_bytes(f"d/kv/{KEYS[0]}") + PAYLOAD_BYTES
RNG = random.Random(1)
PAYLOADS = {f"d/kv/{key}": RNG.randbytes(PAYLOAD_BYTES) for key in KEYS[:-1]}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    """All objects but the last."""
    store = DiskStore(tmp_path / "store", 64 << 20, Counters())
    for name, payload in PAYLOADS.items():
        assert store.write(name, memoryview(payload))
    yield store
    store.close()


@contextmanager
def serving(disk: DiskStore, config: TransportConfig = CONFIG, sites: tuple[str, ...] = ()) -> Iterator[ObjectServer]:
    server = ObjectServer("127.0.0.1", 0, disk, config, sites)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def client_of(port: int, config: TransportConfig = CONFIG, site: str = "pd") -> Iterator[ObjectClient]:
    client = ObjectClient(site, "127.0.0.1", port, config, load_security(config))
    try:
        yield client
    finally:
        client.close()


def within(seconds: float = 30.0) -> Deadline:
    return Deadline(MonotonicClock(), seconds)


def get_all(client: ObjectClient, seconds: float = 30.0) -> tuple[bool, dict[str, bytes]]:
    """Whether all came, and what did, without its head."""
    found: dict[str, bytes] = {}

    def take(name: str, frame: bytearray) -> None:
        view, head = memoryview(frame), head_bytes(name)
        assert is_intact(name, view[:head], view[head:])
        found[name] = bytes(view[head:])

    return client.get(GROUPS, [SIZE] * len(KEYS), take, within(seconds)), found


def test_objects_cross_without_keys_on_this_machine(disk: DiskStore) -> None:
    with serving(disk) as server, client_of(server.port) as client:
        assert list(client.ask(GROUPS, within())) == [SIZE] * (len(KEYS) - 1) + [0]
        assert get_all(client) == (False, PAYLOADS), "up to the first that is not there"
        assert list(client.ask((("e/kv", KEYS[:2]),), within())) == [0, 0], "another model's"
        stats = server.stats()
        assert (stats.questions, stats.objects, stats.bytes) == (2, len(PAYLOADS), SIZE * len(PAYLOADS))
        assert stats.refused == 0


def test_objects_cross_with_keys_and_nobody_between_reads_them(disk: DiskStore, tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "keys")
    with serving(disk, keyring.pd, ("prfaas",)) as server, Relay(server.port) as relay:
        with client_of(relay.port, keyring.prfaas) as client:
            assert client.ask(GROUPS, within())[0] == SIZE
            assert get_all(client)[1] == PAYLOADS
        assert len(relay.seen) > SIZE * len(PAYLOADS)
        payload = next(iter(PAYLOADS.values()))
        assert KEYS[1].encode() not in relay.seen
        assert not any(payload[at : at + 16] in relay.seen for at in range(0, 1600, 16))


@pytest.mark.parametrize("sites", [(), ("third",)])
def test_a_site_that_is_not_listed_gets_nothing_though_its_keys_are_right(
    disk: DiskStore, tmp_path: Path, sites: tuple[str, ...]
) -> None:
    keyring = Keyring(tmp_path / "keys")
    with serving(disk, keyring.pd, sites) as server:
        with client_of(server.port, keyring.prfaas) as client, pytest.raises(PeerGoneError):
            client.ask(GROUPS, within())
        with client_of(server.port, keyring.pd) as client:
            assert client.ask(GROUPS, within())[0] == SIZE, "the own site always"
        assert server.stats().refused == 1


def test_a_server_of_another_site_is_not_believed(disk: DiskStore, tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "keys")
    with (
        serving(disk, keyring.config("third"), ("prfaas",)) as server,
        client_of(server.port, keyring.prfaas) as client,
        pytest.raises(PeerError, match="belongs to site third"),
    ):
        client.ask(GROUPS, within())


def test_strangers_and_peers_without_keys_get_nothing(disk: DiskStore, tmp_path: Path) -> None:
    keyring, strangers = Keyring(tmp_path / "keys"), Keyring(tmp_path / "others")
    with serving(disk, keyring.pd, ("prfaas",)) as server:
        for config in (strangers.prfaas, CONFIG):
            with client_of(server.port, config) as client, pytest.raises(PeerError):
                client.ask(GROUPS, within())
        wait_until(lambda: server.stats().refused == 2, "both refused", 20.0)
        assert server.stats().questions == 0


def test_without_keys_only_this_machine(disk: DiskStore) -> None:
    with pytest.raises(ConfigError, match="without keys"):
        ObjectServer("0.0.0.0", 0, disk, CONFIG)
    with pytest.raises(ConfigError, match=r"peers\.pd: 192\.0\.2\.1"):
        ObjectClient("pd", "192.0.2.1", 1, CONFIG, load_security(CONFIG))
    off = msgspec.structs.replace(CONFIG, security="off")
    ObjectServer("0.0.0.0", 0, disk, off).close()


def test_a_connection_is_used_again_and_a_closed_one_is_not(disk: DiskStore) -> None:
    with serving(disk) as server, client_of(server.port) as client:
        for _ in range(5):
            client.ask(GROUPS, within())
        assert len(server._connections) == 1
        for connection in list(server._connections):
            connection.cut()
        wait_until(lambda: not server._connections, "the end of the connection", 20.0)
        assert get_all(client)[1] == PAYLOADS


def test_a_server_that_is_gone_is_noticed_at_once(disk: DiskStore) -> None:
    with serving(disk) as server:
        port = server.port
    with client_of(port) as client, pytest.raises(PortRefusedError):
        client.ask(GROUPS, within())


def test_a_cut_in_the_middle_ends_the_fetch_with_what_came(disk: DiskStore) -> None:
    with serving(disk) as server:
        relay = FaultyRelay(server.port, seed=1)
        try:
            with client_of(relay.port) as client:
                found: list[str] = []

                def take(name: str, frame: bytearray) -> None:
                    found.append(name)
                    if len(found) == 5:
                        relay.cut(0.0)

                keys = KEYS[:-1] * 20  # far more than sockets hold
                with pytest.raises(PeerGoneError):
                    client.get((("d/kv", keys),), [SIZE] * len(keys), take, within())
                assert 5 <= len(found) < len(keys)
                assert client.ask(GROUPS, within())[0] == SIZE, "the next question dials again"
        finally:
            relay.close()


def test_closing_the_server_ends_what_it_sends(disk: DiskStore) -> None:
    """Far more than sockets hold."""
    keys = KEYS[:-1] * 20
    with serving(disk) as server, client_of(server.port) as client, pytest.raises(PeerGoneError):
        client.get((("d/kv", keys),), [SIZE] * len(keys), lambda name, frame: server.close(), within())


def test_closing_the_client_ends_what_it_waits_for(disk: DiskStore) -> None:
    with scripted(lambda sock: sock.recv(1 << 16)) as port, client_of(port) as client:
        closer = threading.Timer(0.2, client.close)
        closer.start()
        with pytest.raises(PeerGoneError):
            client.ask(GROUPS, within())
        closer.join()
        with pytest.raises(PeerGoneError, match="closing"):
            client.ask(GROUPS, within())


@contextmanager
def scripted(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """A server that reads and says what `serve` does, and keeps its connections open; its port."""
    listener = socket.create_server(("127.0.0.1", 0))
    open_ones: list[socket.socket] = []

    def run() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            open_ones.append(sock)
            try:
                serve(sock)
            except OSError:
                pass  # the client has gone

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        for sock in open_ones:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client has gone
        thread.join()
        for sock in [listener, *open_ones]:
            sock.close()


def test_a_silent_peer_and_one_that_trickles_end_with_the_deadline() -> None:
    def trickle(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(OBJECT_LENGTH.pack(SIZE))
        pause = threading.Event()
        while not pause.wait(0.02):
            sock.sendall(b"x")

    for serve in (lambda sock: sock.recv(1 << 16), trickle):
        with scripted(serve) as port, client_of(port) as client, pytest.raises(DeadlineError):
            get_all(client, 0.5)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ProtocolError),
        (pack(Sizes((1, 2))), ProtocolError),
        (HEAD.pack(3, 0) + b"abc", PeerError),
        (HEAD.pack((1 << 32) - 1, 0), ProtocolError),
    ],
)
def test_wrong_answers_are_refused(answer: bytes, error: type[Exception]) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(answer)

    with scripted(serve) as port, client_of(port) as client, pytest.raises(error):
        client.ask(GROUPS, within())


@pytest.mark.parametrize("length", [1, SIZE + 1, (1 << 64) - 1])
def test_an_object_of_another_length_than_announced_is_not_read(length: int) -> None:
    def serve(sock: socket.socket) -> None:
        sock.recv(1 << 16)
        sock.sendall(OBJECT_LENGTH.pack(length))

    with scripted(serve) as port, client_of(port) as client, pytest.raises(ProtocolError, match="were announced"):
        get_all(client)


def test_garbage_ends_a_connection_and_others_go_on(disk: DiskStore) -> None:
    rng = random.Random(2)
    whole = pack(Get(GROUPS))
    with serving(disk) as server, client_of(server.port) as client:
        for turn in range(60):
            data = bytearray(pack(Ask(GROUPS)) if turn % 2 else rng.randbytes(rng.randrange(12, 400)))
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            with socket.create_connection(("127.0.0.1", server.port)) as sock:
                sock.settimeout(60.0)
                said = b""
                with contextlib.suppress(OSError):  # the server may have closed with bytes unread
                    sock.sendall(data)
                    sock.shutdown(socket.SHUT_WR)
                    said = sock.recv(1)
                assert not said
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(whole[:-1])  # half a request, and silence
            assert get_all(client)[1] == PAYLOADS
        wait_until(lambda: server.stats().refused == 61, "all of them counted", 20.0)
        assert server.stats().questions == 0


def test_too_many_connections_cost_the_oldest_that_proved_nothing(
    disk: DiskStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_server, "MAX_PENDING", 4)
    keyring = Keyring(tmp_path / "keys")
    with serving(disk, keyring.pd, ("prfaas",)) as server:
        socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(12)]
        try:
            with client_of(server.port, keyring.prfaas) as client:
                assert client.ask(GROUPS, within())[0] == SIZE
            wait_until(lambda: len(server._connections) <= 4, "the oldest cut", 20.0)
        finally:
            for sock in socks:
                sock.close()


def test_no_more_than_so_many_connections(disk: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_server, "MAX_CONNECTIONS", 2)
    with serving(disk) as server:
        socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
        try:
            wait_until(lambda: len(server._connections) == 2, "two connections", 20.0)
            with client_of(server.port) as client, pytest.raises(PeerGoneError):
                client.ask(GROUPS, within())
        finally:
            for sock in socks:
                sock.close()


def test_a_corrupt_object_is_not_sent(disk: DiskStore) -> None:
    name = f"d/kv/{KEYS[3]}"
    path = disk._path(name)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with serving(disk) as server, client_of(server.port) as client:
        whole, found = get_all(client)
        assert not whole
        assert name not in found
        assert client.ask(GROUPS, within())[3] == 0, "dropped"
