"""Keys for tests: a deployment of sites, and strangers whose sites bear the same names."""

from __future__ import annotations

import datetime
import ssl
from pathlib import Path

import msgspec
import zmq

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.security import make
from sglang_prfaas.transport.security.key_files import CURVE_KEY, read_curve_key
from sglang_prfaas.transport.security.tls import client_context
from tests.byte_relay import ByteRelay
from tests.transport.rig import CONFIG, DEADLINE_S

LOOPBACK = ("127.0.0.0/8", "::1")


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


class Keyring:
    """A deployment's keys in `directory`: prefill is site prfaas, decode site pd; `third` is another site of it."""

    def __init__(self, directory: Path, prfaas_at: tuple[str, ...] = LOOPBACK) -> None:
        self.directory = directory
        make.make_keys(directory, {"prfaas": prfaas_at, "pd": (), "third": ()}, now=now())

    def config(self, site: str, base: TransportConfig = CONFIG) -> TransportConfig:
        return msgspec.structs.replace(base, keys_dir=str(self.directory / site))

    @property
    def prfaas(self) -> TransportConfig:
        return self.config("prfaas")

    @property
    def pd(self) -> TransportConfig:
        return self.config("pd")

    def curve(self, site: str) -> tuple[bytes, bytes]:
        """Public and secret key."""
        return read_curve_key(self.directory / site / CURVE_KEY)

    def dealer(self, context: zmq.Context[zmq.Socket[bytes]], site: str, server: str) -> zmq.Socket[bytes]:
        """A client socket of a site, for a server of another."""
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.RCVTIMEO, int(DEADLINE_S * 1000))
        sock.curve_publickey, sock.curve_secretkey = self.curve(site)
        sock.curve_serverkey = self.curve(server)[0]
        return sock

    def client_context(self, site: str) -> ssl.SSLContext:
        home = self.directory / site
        return client_context(home / "ca.crt", home / "site.crt", home / "site.key")

    def expired(self, site: str) -> tuple[Path, Path]:
        """A certificate of a site that has expired, in every peers.toml of the deployment, and its key."""
        home = self.directory / site
        current = {name: (home / name).read_bytes() for name in ("site.crt", "site.key", "curve.key")}
        for name in ("site.crt", "site.key", "curve.key"):
            (home / name).unlink()
        done: list[str] = []
        make._site(self.directory, site, 1, now() - datetime.timedelta(days=30), done)
        certificate, key = self.directory / "expired.crt", self.directory / "expired.key"
        (home / "site.crt").rename(certificate)
        (home / "site.key").rename(key)
        fingerprint = make._fingerprint(certificate)
        for name, data in current.items():
            (home / name).write_bytes(data)
            (home / name).chmod(0o600)
        for path in self.directory.glob("**/peers.toml"):
            own = make._fingerprint(home / "site.crt")
            path.write_text(path.read_text().replace(f'"{own}"', f'"{own}", "{fingerprint}"'))
        return certificate, key


class Relay(ByteRelay):
    """Keeps a copy of what passes."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.seen = bytearray()

    def passing(self, data: bytes, *, from_far: bool) -> bool:
        self.seen += data
        return True
