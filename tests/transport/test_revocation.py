"""A site, a key or a certificate is taken off the list: what it has open is cut within seconds, the rest goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from sglang_prfaas.clock import Deadline, MonotonicClock
from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.stats import Counters
from sglang_prfaas.transport.addresses import endpoint
from sglang_prfaas.transport.object_client import ObjectClient
from sglang_prfaas.transport.object_server import ObjectServer
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.security import load_security, make
from tests.transport.keyring import Keyring
from tests.transport.rig import CONFIG, PAGES, Memory, Pair, layout, lines, some_slots, wait_ended, wait_until, works

SECONDS = 5.0
"""Within which a cut has to come."""


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys")


@contextlib.contextmanager
def third_site(keyring: Keyring) -> Iterator[ReceiveMover]:
    mover = ReceiveMover(
        layout(), Memory(layout(), None).rank, keyring.config("third"), MonotonicClock(), site="third", server="d"
    )
    mover.start()
    try:
        yield mover
    finally:
        mover.close()


def without(keyring: Keyring, at: str, what: str) -> str:
    """Take a key or a fingerprint out of the list of a site; returns the list as it was."""
    path = keyring.directory / at / "peers.toml"
    text = path.read_text()
    assert what in text
    path.write_text(text.replace(f'"{what}"', ""))
    return text


def test_a_site_whose_key_is_taken_off_is_cut(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as pair, third_site(keyring) as third:
        slots = some_slots(1)
        transfer, item = pair.ready(1, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES][:5])
        bystander = pair.session(third)
        key = keyring.curve("pd")[0].decode()
        began_s = time.monotonic()
        text = without(keyring, "prfaas", key)
        wait_ended(transfer, item.transfer)
        assert time.monotonic() - began_s < SECONDS
        assert f"its key {key} is not in peers.toml any more" in transfer.reason
        assert f"its key {key} is not in peers.toml any more" in item.transfer.reason
        wait_until(lambda: len(pair.sender._table.sessions) == 1, "one session left")
        said = lines(caplog, f"its key {key} is not in peers.toml any more", "session with decode pd/decode-0 ended")
        assert len(said) == 1
        refused = pair.dial()
        wait_until(lambda: refused.failure, "no new session")
        assert bystander.up
        (keyring.directory / "prfaas" / "peers.toml").write_text(text)
        works(pair, 2)
        assert pair.session(third) is bystander


def test_a_control_connection_without_a_session_is_cut_too(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as pair:
        dealer = keyring.dealer(context, "third", "prfaas")
        dealer.monitor("inproc://seen", zmq.EVENT_DISCONNECTED)
        seen = context.socket(zmq.PAIR)
        seen.connect("inproc://seen")
        dealer.connect(endpoint("127.0.0.1", pair.sender.control_port))
        try:
            dealer.send(b"anything")
            dealer.recv()
            works(pair, 1)
            (established,) = pair.receiver._table.sessions.values()
            key = keyring.curve("third")[0].decode()
            without(keyring, "prfaas", key)
            assert seen.poll(int(SECONDS * 1000)), "the connection is closed"
            assert len(lines(caplog, "control connection from 127.0.0.1 of site third ended", key)) == 1
            works(pair, 2)
            assert established.up
        finally:
            context.destroy(linger=0)


def test_a_certificate_that_is_taken_off(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    impatient = msgspec.structs.replace(CONFIG, reconnect_timeout_s=1.0)
    with Pair(config=keyring.prfaas, decode_config=keyring.config("pd", impatient)) as pair:
        works(pair, 1)
        (session,) = pair.receiver._table.sessions.values()
        old = make._fingerprint(keyring.directory / "pd" / "site.crt")
        without(keyring, "prfaas", old)
        wait_until(lambda: session.failure, "end of the session", SECONDS)
        assert lines(caplog, "data connection", f"its certificate {old} is not in peers.toml any more")
        assert "certificate" in session.failure or "data connections" in session.failure


def test_a_new_certificate_takes_over_without_a_request_lost(keyring: Keyring) -> None:
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as pair:
        slots = some_slots(1)
        transfer, item = pair.ready(1, slots)
        pair.sender.send(transfer, PAGES, 0, slots[PAGES][:5])
        session = item.session
        before = set(session.connections.values())
        home = keyring.directory / "pd"
        old, curve = make._fingerprint(home / "site.crt"), (home / "curve.key").read_bytes()
        for name in ("site.crt", "site.key"):
            (home / name).unlink()
        (home / "curve.key").unlink()
        make._site(keyring.directory, "pd", 30, make.datetime.datetime.now(make.datetime.UTC), [])
        (home / "curve.key").write_bytes(curve)
        new = make._fingerprint(home / "site.crt")
        path = keyring.directory / "prfaas" / "peers.toml"
        path.write_text(path.read_text().replace(old, new))
        wait_until(lambda: not before & set(session.connections.values()), "all connections made anew")
        pair.sender.send(transfer, PAGES, 5, slots[PAGES][5:])
        for component in range(1, len(slots)):
            pair.sender.send(transfer, component, 0, slots[component])
        pair.sender.finish(transfer)
        wait_ended(transfer, item.transfer)
        assert not transfer.reason
        assert session.up


def test_decode_takes_the_prefill_site_off_its_list(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as pair:
        works(pair, 1)
        (session,) = pair.receiver._table.sessions.values()
        key = keyring.curve("prfaas")[0].decode()
        without(keyring, "pd", key)
        wait_until(lambda: session.failure, "end of the session", SECONDS)
        why = f"its key {key} is not in peers.toml any more"
        assert why in session.failure
        wait_until(lambda: len(lines(caplog, "session with prefill", why)) == 1, "one line in the log", SECONDS)


def test_readers_of_a_prefix_cache_are_cut(keyring: Keyring, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DiskStore(tmp_path / "store", 1 << 20, Counters())
    server = ObjectServer("127.0.0.1", 0, store, keyring.prfaas, ("pd",))
    client = ObjectClient("prfaas", "127.0.0.1", server.port, keyring.pd, load_security(keyring.pd))
    try:
        groups = (("d/kv", (f"{1:064x}",)),)
        client.ask(groups, Deadline(MonotonicClock(), 20.0))
        wait_until(lambda: len(server._connections) == 1, "a connection")
        without(keyring, "prfaas", make._fingerprint(keyring.directory / "pd" / "site.crt"))
        wait_until(lambda: not server._connections, "its end", SECONDS)
        assert len(lines(caplog, "prefix cache: connection of site pd ended")) == 1
    finally:
        client.close()
        server.close()
        store.close()
