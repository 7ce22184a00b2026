"""The bootstrap directory with keys: who may register, who may ask, and which key is tried where."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import zmq

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.directory import DirectoryServer
from sglang_prfaas.transport.messages import (
    Directory,
    InnerRail,
    Lookup,
    RankInfo,
    Register,
    decode_from_directory,
    encode,
)
from sglang_prfaas.transport.receive_mover import ReceiveMover
from sglang_prfaas.transport.registration import Registration
from sglang_prfaas.transport.security import PLAIN, Security, load_security, make
from tests.transport.keyring import Keyring, now
from tests.transport.rig import AT_ONCE_S, CONFIG, Memory, Pair, layout, lines, wait_until, works

REGISTER = Register(RankInfo(0, 0, 0, "", 7000), "boot", 1, 1, 1, True)


@pytest.fixture(scope="module")
def keyring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    """Sites that may be anywhere: the right key has to be found by trying."""
    return Keyring(tmp_path_factory.mktemp("keys"), ())


def register(port: int, security: Security, control_port: int = 7000, host: str = "127.0.0.1") -> Registration:
    made = Registration(
        host,
        port,
        RankInfo(0, 0, 0, "", control_port),
        MonotonicClock(),
        dp_size=1,
        tp_size=1,
        pp_size=1,
        follow_bootstrap_room=True,
        security=security,
    )
    made.start()
    return made


@pytest.mark.parametrize(("bound", "asked"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")])
def test_the_whole_way_with_keys(keyring: Keyring, bound: str, asked: str) -> None:
    with Pair(host=bound, config=keyring.prfaas, decode_config=keyring.pd) as pair:
        directory = DirectoryServer(bound, 0, config=keyring.prfaas)
        rank = register(directory.port, pair.sender.security, pair.sender.control_port, asked)
        try:
            found: list[Directory] = []

            def ask() -> bool:
                answer = pair.receiver.directory(asked, directory.port)
                found.extend([answer] if answer is not None else [])
                return bool(found)

            wait_until(ask, "the directory's answer")
            assert found[0].ranks[0].control_port == pair.sender.control_port
            pair.dial = lambda receiver=None: (receiver or pair.receiver).session(  # type: ignore[method-assign,misc]
                authority(asked, directory.port), asked, pair.sender.control_port
            )
            works(pair, 1)
        finally:
            rank.close()
            directory.close()


def test_who_has_no_key_learns_and_changes_nothing(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    directory = DirectoryServer("127.0.0.1", 0, config=keyring.prfaas)
    plain = register(directory.port, PLAIN)
    context = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.LINGER, 0)
    asker = ReceiveMover(layout(), Memory(layout(), None).rank, CONFIG, MonotonicClock())
    asker.start()
    try:
        sock.connect(f"tcp://127.0.0.1:{directory.port}")
        sock.send(encode(REGISTER))
        sock.send(encode(Lookup()))
        began_s = time.monotonic()
        assert asker.directory("127.0.0.1", directory.port) is None

        def ask() -> str:
            assert asker.directory("127.0.0.1", directory.port) is None
            return asker.directory_problem("127.0.0.1", directory.port)

        wait_until(ask, "the refusal")
        assert time.monotonic() - began_s < AT_ONCE_S
        problem = asker.directory_problem("127.0.0.1", directory.port)
        assert problem.startswith(f"bootstrap directory 127.0.0.1:{directory.port}: it ")
        assert "demands keys" in problem
        wait_until(lambda: lines(caplog, "this rank cannot register in its bootstrap directory"), "the rank's line")
        assert not sock.poll(200)
        assert not directory.table.directory().ranks
    finally:
        asker.close()
        plain.close(timeout_s=0.1)
        context.destroy(linger=0)
        directory.close()


def test_only_the_own_site_may_register(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    directory = DirectoryServer("127.0.0.1", 0, remote_ranks=True, config=keyring.prfaas)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        other, own = (keyring.dealer(context, site, "prfaas") for site in ("pd", "prfaas"))
        for sock in (other, own):
            sock.connect(f"tcp://127.0.0.1:{directory.port}")
        other.send(encode(REGISTER))
        other.send(encode(Lookup()))
        answer = decode_from_directory(other.recv())
        assert isinstance(answer, Directory)
        assert not answer.ranks
        assert lines(caplog, "directory: Register from 127.0.0.1, of site pd, refused")
        own.send(encode(REGISTER))
        own.recv()
        assert directory.table.directory().complete
    finally:
        context.destroy(linger=0)
        directory.close()


def test_only_the_own_site_is_told_of_inner_rails(keyring: Keyring) -> None:
    directory = DirectoryServer("127.0.0.1", 0, config=keyring.prfaas)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    rail = InnerRail("mooncake", "prfaas", "10.0.0.1", 9000)
    try:
        other, own = (keyring.dealer(context, site, "prfaas") for site in ("pd", "prfaas"))
        for sock in (other, own):
            sock.connect(f"tcp://127.0.0.1:{directory.port}")
        own.send(encode(Register(RankInfo(0, 0, 0, "", 7000, rail), "boot", 1, 1, 1, True)))
        own.recv()
        told = {}
        for site, sock in (("pd", other), ("prfaas", own)):
            sock.send(encode(Lookup()))
            answer = decode_from_directory(sock.recv())
            assert isinstance(answer, Directory)
            told[site] = [(rank.control_port, rank.rail) for rank in answer.ranks]
        assert told == {"pd": [(7000, None)], "prfaas": [(7000, rail)]}
    finally:
        context.destroy(linger=0)
        directory.close()


def test_no_site_at_an_address(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "keys", ("10.1.0.0/24", "prefill.example.org"))
    for site in ("pd", "third"):
        make.make_keys(keyring.directory, {site: ("10.2.0.1",)}, now=now())
    security = load_security(keyring.pd)
    assert [key.site for key in security.server_keys("10.1.0.77")] == ["prfaas"]
    assert [key.site for key in security.server_keys("prefill.example.org")] == ["prfaas"]
    assert [key.site for key in security.server_keys("10.2.0.1")] == ["pd", "third"]
    asker = ReceiveMover(layout(), Memory(layout(), None).rank, keyring.pd, MonotonicClock())
    asker.start()
    try:
        asker.directory("127.0.0.1", 9)
        wait_until(lambda: asker.directory_problem("127.0.0.1", 9), "the refusal")
        assert "peers.toml has no site at 127.0.0.1" in asker.directory_problem("127.0.0.1", 9)
        session = asker.session("127.0.0.1:9", "127.0.0.1", 9)
        wait_until(lambda: session.failure, "failure")
        assert "peers.toml has no site at 127.0.0.1" in session.failure
    finally:
        asker.close()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "*"])
def test_no_keys_beyond_loopback(host: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"bootstrap directory would listen on .*transport\.keys_dir"):
        DirectoryServer(host, 0)
    DirectoryServer(host, 0, config=TransportConfig(security="off")).close()
    assert len(lines(caplog, "the bootstrap directory listens on", 'transport.security = "off"')) == 1


def test_keys_are_exchanged_while_servers_run(tmp_path: Path) -> None:
    keyring = Keyring(tmp_path / "keys")
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as before:
        works(before, 1)
        make.roll(keyring.directory, "prfaas", now=now())
        with Pair(config=keyring.prfaas, decode_config=keyring.pd) as after:
            works(after, 2)
            works(before, 3)
            late = ReceiveMover(layout(), Memory(layout(), None).rank, keyring.pd, MonotonicClock())
            late.start()
            try:
                # It tries the new key, then the old one, which this server still has.
                wait_until(lambda: before.dial(late).up, "a session with the old key")
                make.retire(keyring.directory, "prfaas")
                assert [key.site for key in load_security(keyring.pd).server_keys("127.0.0.1")] == ["prfaas"]
                works(after, 4)
            finally:
                late.close()
