"""Data connections with keys: what is no TLS, and certificates that get nothing."""

from __future__ import annotations

import socket
import ssl
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from sglang_prfaas.errors import ConfigError, PeerError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.addresses import endpoint
from sglang_prfaas.transport.framing import Preface
from sglang_prfaas.transport.mailbox import seal, unseal
from sglang_prfaas.transport.messages import PROTOCOL_VERSION, Hello, Welcome, decode_to_decode, encode
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.security.tls import client_context
from tests.transport.fakes import INSTANCE, FakeDecode, at_end
from tests.transport.keyring import Keyring
from tests.transport.rig import (
    AT_ONCE_S,
    CONFIG,
    DEADLINE_S,
    Pair,
    lines,
    wait_until,
    works,
)


@pytest.mark.parametrize(
    ("first_bytes", "why"),
    [
        (Preface(0, b"0123456789abcdef").pack(), "it does not speak TLS"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "it does not speak TLS (http request)"),
        (b"\x16\x03\x01\x02\x00\x01" + b"\xff" * 600, "TLS handshake failed"),
    ],
)
def test_bytes_that_are_no_tls_are_refused_at_once(
    pair: Pair, caplog: pytest.LogCaptureFixture, first_bytes: bytes, why: str
) -> None:
    pair.session()
    began_s = time.monotonic()
    with socket.create_connection(("127.0.0.1", pair.sender.data_port), timeout=DEADLINE_S) as sock:
        sock.sendall(first_bytes)
        assert at_end(sock)
    assert time.monotonic() - began_s < AT_ONCE_S
    wait_until(lambda: len(lines(caplog, "data connection from 127.0.0.1 refused", why)) == 1, "the line")
    works(pair, 7)


def test_a_silent_data_connection_keeps_nobody_out(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    config = msgspec.structs.replace(keyring.prfaas, handshake_timeout_s=1.0)
    with Pair(config=config, decode_config=keyring.pd) as pair:
        with socket.create_connection(("127.0.0.1", pair.sender.data_port), timeout=DEADLINE_S) as sock:
            works(pair, 7)
            assert at_end(sock)
        assert lines(caplog, "data connection from 127.0.0.1 refused: no preface within 1 s")


def _token(pair: Pair, keyring: Keyring, decode: FakeDecode, site: str = "pd") -> bytes:
    """Of a session that was opened with the right CURVE key."""
    dealer = keyring.dealer(decode.context, site, "prfaas")
    dealer.setsockopt(zmq.ROUTING_ID, b"Dkeyed")
    dealer.connect(endpoint("127.0.0.1", pair.sender.control_port))
    dealer.send(seal(encode(Hello(PROTOCOL_VERSION, "", "x", pair.layout, 1, 4096, INSTANCE, 0))))
    answer = decode_to_decode(unseal(dealer.recv())[2])
    assert isinstance(answer, Welcome)
    return answer.token


@pytest.mark.parametrize(
    "case", ["no certificate", "another authority", "expired", "not listed", "another site", "TLS 1.2"]
)
def test_certificates_that_get_nothing(
    keyring: Keyring, strangers: Keyring, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    if case in ("expired", "not listed"):
        keyring = Keyring(tmp_path / "keys")
    home = keyring.directory / "pd"
    if case == "no certificate":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(home / "ca.crt")
    elif case == "another authority":
        context = strangers.client_context("pd")
        context.load_verify_locations(home / "ca.crt")
    elif case == "expired":
        context = client_context(home / "ca.crt", *keyring.expired("pd"))
    elif case == "another site":
        context = keyring.client_context("third")
    elif case == "TLS 1.2":
        context = keyring.client_context("pd")
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    else:
        context = keyring.client_context("third")
        peers = keyring.directory / "prfaas" / "peers.toml"
        peers.write_text(peers.read_text().partition('["third"]')[0])
    why = {
        "no certificate": "it has no certificate",
        "another authority": "TLS handshake failed: certificate refused",
        "expired": "certificate refused: certificate has expired",
        "not listed": "its certificate sha256:",
        "another site": "it is of site third, the session with its token of pd",
        "TLS 1.2": "it does not speak TLS (unsupported protocol)",
    }[case]
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as pair, FakeDecode(pair.sender.control_port) as decode:
        token = _token(pair, keyring, decode)
        got = b""
        try:
            with (
                socket.create_connection(("127.0.0.1", pair.sender.data_port), timeout=DEADLINE_S) as raw,
                context.wrap_socket(raw) as sock,
            ):
                sock.sendall(Preface(0, token).pack())
                got = sock.recv(1)
        except OSError:
            pass  # the server's alert, or its end
        assert got == b""
        wait_until(lambda: lines(caplog, "data connection from 127.0.0.1 refused", why), "the prefill server's line")
        assert not pair.sender._table.sessions[b"Dkeyed"].links
        works(pair, 7)
        assert len(lines(caplog, "data connection from 127.0.0.1 refused")) == 1


def test_decode_tells_what_became_of_its_expired_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keyring = Keyring(tmp_path / "keys")
    with Pair(config=keyring.prfaas, decode_config=keyring.pd) as pair:
        for path, name in zip(keyring.expired("pd"), ("site.crt", "site.key"), strict=True):
            (tmp_path / "keys" / "pd" / name).write_bytes(path.read_bytes())
        session = pair.dial()
        wait_until(lambda: session.failure, "refusal")
        assert "the other side refused this site's certificate or key (certificate expired)" in session.failure
        line = ("data connection from 127.0.0.1 refused: TLS handshake failed", "certificate has expired")
        wait_until(lambda: lines(caplog, *line), "the prefill server's line")
        with pytest.raises(
            ConfigError, match=r"site\.crt is refused: certificate has expired; make a new one .* --roll SITE"
        ):
            load_security(keyring.pd)


def test_a_data_port_of_another_site_or_deployment(keyring: Keyring, strangers: Keyring) -> None:
    for prefill, expected in (
        (keyring.config("third"), "belongs to site third, expected prfaas"),
        (strangers.prfaas, "certificate refused: self-signed certificate|certificate refused: unable|signature"),
    ):
        with Pair(config=prefill, decode_config=prefill) as pair:
            connection = data_tcp.unconnected("127.0.0.1", CONFIG)
            try:
                with pytest.raises(PeerError, match=expected):
                    data_tcp.connect(
                        connection, "127.0.0.1", pair.sender.data_port, DEADLINE_S, load_security(keyring.pd), "prfaas"
                    )
            finally:
                connection.close()
