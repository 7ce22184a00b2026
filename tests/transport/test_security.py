"""With keys: everything works; without them, or with others, nobody gets in or reads anything."""

from __future__ import annotations

import logging
import re
import ssl
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.addresses import endpoint
from sglang_prfaas.transport.mailbox import seal, unseal
from sglang_prfaas.transport.messages import PROTOCOL_VERSION, Hello, Refuse, decode_to_decode, encode
from sglang_prfaas.transport.receive_mover import PeerSession, ReceiveMover
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.transfer import State
from tests.transport.fakes import INSTANCE, FakeDecode
from tests.transport.keyring import Keyring, Relay
from tests.transport.rig import (
    AT_ONCE_S,
    CONFIG,
    Memory,
    Pair,
    assert_moved,
    layout,
    lines,
    some_slots,
    wait_ended,
    wait_until,
    works,
)


def refused(receiver: ReceiveMover, pair: Pair) -> PeerSession:
    """A session that fails at once."""
    began_s = time.monotonic()
    session = pair.dial(receiver)
    wait_until(lambda: session.failure, "refusal")
    assert time.monotonic() - began_s < AT_ONCE_S
    assert not session.up
    assert not pair.sender._table.sessions
    return session


# --- keys that fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::", "0.0.0.0"])
def test_everything_works_with_keys(keyring: Keyring, host: str) -> None:
    with Pair(host=host, config=keyring.prfaas, decode_config=keyring.pd) as pair:
        pair.host = {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(host, host)
        for room in (1, 2, 3):
            works(pair, room)
        (session,) = pair.sender._table.sessions.values()
        assert session.site == "pd"
        connections = [link.connection for link in session.links.values()]
        assert all(isinstance(c.sock, ssl.SSLSocket) and c.site == "pd" for c in connections)
        versions = {c.sock.version() for c in connections if isinstance(c.sock, ssl.SSLSocket)}
        assert versions == {"TLSv1.3"}


@pytest.mark.parametrize("keys", [True, False])
def test_nothing_can_be_read_on_the_wire(keyring: Keyring, keys: bool) -> None:
    config, decode_config = (keyring.prfaas, keyring.pd) if keys else (CONFIG, CONFIG)
    source = Memory(layout(), 1)
    for component in source.arrays:
        for buffer in component:
            buffer[:] = ord("K")
    with (
        Pair(config=config, decode_config=decode_config, send_memory=source) as pair,
        Relay(pair.sender.control_port) as control,
        Relay(pair.sender.data_port) as data,
    ):
        pair.sender.control_port, pair.sender._handshake.data_port = control.port, data.port
        works(pair, 7)
        pair.receiver.close()
        assert len(data.seen) > 100_000
        readable = [b"KKKKKKKK" in data.seen, b"PFC1" in data.seen, b"Hybrid-abc" in control.seen]
        assert readable == [not keys] * 3


def test_a_cut_connection_stays_encrypted(pair: Pair) -> None:
    session = pair.session()
    connection = session.connections[0]
    assert isinstance(connection.sock, ssl.SSLSocket)
    connection.cut()
    assert connection.sock._sslobj is not None  # type: ignore[attr-defined]
    works(pair, 8)


# --- keys that do not -------------------------------------------------------------------------------------------------


def test_a_decode_rank_with_keys_of_another_deployment(
    pair: Pair, keyring: Keyring, strangers: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    # It has found out the server's public key, which is no secret.
    text = (strangers.directory / "pd" / "peers.toml").read_text()
    ours, theirs = keyring.curve("prfaas")[0].decode(), strangers.curve("prfaas")[0].decode()
    (strangers.directory / "pd" / "peers.toml").write_text(text.replace(theirs, ours))
    stranger = ReceiveMover(layout(), Memory(layout(), None).rank, strangers.pd, MonotonicClock())
    stranger.start()
    try:
        session = refused(stranger, pair)
        assert session.failure.endswith(": it does not let this site's key in")
        public = strangers.curve("pd")[0].decode()
        expected = f"control connection from 127.0.0.1 refused: its key {public} is not in peers.toml"
        wait_until(lambda: lines(caplog, expected), "the prefill server's line")
        assert len(lines(caplog, "session with prefill", "does not let this site's key in")) == 1
    finally:
        stranger.close()
        (strangers.directory / "pd" / "peers.toml").write_text(text)
    works(pair, 7)


def test_a_prefill_server_with_keys_of_another_deployment(
    keyring: Keyring, strangers: Keyring, caplog: pytest.LogCaptureFixture
) -> None:
    with Pair(config=strangers.prfaas, decode_config=keyring.pd) as pair:
        session = refused(pair.receiver, pair)
        assert session.failure.endswith("it does not hold the key of site prfaas, or is about to end")
        wait_until(lambda: lines(caplog, "control connection from 127.0.0.1 refused: it expects another key"), "a line")


def test_a_decode_rank_without_keys(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plain = ReceiveMover(layout(), Memory(layout(), None).rank, CONFIG, MonotonicClock())
    plain.start()
    try:
        session = refused(plain, pair)
        assert "it demands keys" in session.failure
        assert "(transport.keys_dir)" in session.failure
        line = r"(127\.0\.0\.1|an unknown address) refused: it (has no keys|left during)"
        wait_until(lambda: re.search(line, caplog.text), "a line")
    finally:
        plain.close()
    works(pair, 7)


def test_a_prefill_server_without_keys(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    with Pair(config=CONFIG, decode_config=keyring.pd) as pair:
        session = refused(pair.receiver, pair)
        assert re.search("it works without keys|it does not hold the key of site prfaas", session.failure)
        wait_until(lambda: lines(caplog, "session with prefill"), "a line")
    assert len(lines(caplog, "session with prefill")) == 1


def test_a_site_taken_out_of_the_list_and_put_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keyring = Keyring(tmp_path / "keys")
    path = tmp_path / "keys" / "prfaas" / "peers.toml"
    text = path.read_text()
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as pair:
        works(pair, 1)
        (established,) = pair.receiver._table.sessions.values()
        path.write_text(text.replace(keyring.curve("pd")[0].decode(), zmq.curve_keypair()[0].decode()))
        other = ReceiveMover(layout(), Memory(layout(), None).rank, keyring.pd, MonotonicClock())
        other.start()
        try:
            session = pair.dial(other)
            wait_until(lambda: session.failure, "refusal")
            wait_until(lambda: established.failure, "end of what stood")
            path.write_text("[pd\n")
            session = pair.dial(other)
            wait_until(lambda: session.failure, "refusal")
            assert lines(caplog, "peers as before, for now", "peers.toml")
            path.write_text(text)
            assert pair.session(other).up
            works(pair, 2)
        finally:
            other.close()


def test_a_site_cannot_call_itself_another(pair: Pair, keyring: Keyring) -> None:
    with FakeDecode(pair.sender.control_port) as decode:
        dealer = keyring.dealer(decode.context, "third", "prfaas")
        dealer.connect(endpoint("127.0.0.1", pair.sender.control_port))
        dealer.send(seal(encode(Hello(PROTOCOL_VERSION, "pd", "x", pair.layout, 1, 4096, INSTANCE, 0))))
        answer = decode_to_decode(unseal(dealer.recv())[2])
        assert answer == Refuse("it calls itself site pd, its key is of site third")


# --- where one may listen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", ""])
def test_no_keys_beyond_loopback(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"mover would listen on .*launch keys DIR.*PRFAAS_SECURITY=off"):
        Pair(host=host)
    assert not caplog.records
    off = msgspec.structs.replace(CONFIG, security="off")
    with Pair(host=host, config=off):
        assert len(lines(caplog, "the KVCache mover listens on", "can read and forge KVCache")) == 1


def test_keys_without_a_directory() -> None:
    with pytest.raises(ConfigError, match=r"needs transport\.keys_dir"):
        load_security(TransportConfig(security="keys"))


def test_keys_are_not_used_where_they_are_off(keyring: Keyring) -> None:
    assert load_security(msgspec.structs.replace(keyring.pd, security="off")).keys is None


def test_connections_are_made_anew_before_their_keys_are_used_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_tcp, "MAX_TLS_RECORDS", 5)
    dialled: list[object] = []
    connect = data_tcp.connect
    monkeypatch.setattr(data_tcp, "connect", lambda *args: (dialled.append(args[0]), connect(*args)))
    session = pair.session()
    for room in range(10):
        works(pair, room)
    assert len(dialled) > 20
    assert pair.receiver._table.sessions["127.0.0.1", pair.sender.control_port] is session
    wait_until(lambda: len(next(iter(pair.sender._table.sessions.values())).links) == 3, "all connections")
    wait_until(lambda: len(session.connections) == 3, "all connections")


def test_many_transfers_with_keys(pair: Pair) -> None:
    """Large enough for many records, over all connections."""
    for room in range(20):
        slots = some_slots(room)
        transfer, item = pair.ready(room, slots)
        pair.send_all(transfer, slots, step=3)
        wait_ended(transfer, item.transfer)
        assert transfer.state is State.DONE
        assert_moved(pair.source, slots, pair.target, slots)
        pair.sender.release(transfer)
        pair.receiver.release(item)
