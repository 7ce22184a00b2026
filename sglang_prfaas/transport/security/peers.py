"""The allow-list of a site, `peers.toml`: which sites may connect, and what proves that a peer is one of them.

    [prfaas]
    addresses = ["10.1.0.0/24", "prefill.example.org"]   # where its servers are dialled; none: anywhere
    curve = ["..."]                                      # CURVE public keys, Z85 (RFC 32)
    certificates = ["sha256:..."]                        # fingerprints of its TLS certificates

Several keys of one site are for the time in which they are exchanged. The file is read again once it changes: a site
or a key that is taken out of it cannot connect any more, and the connections that it has are cut (`Watch`).
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import struct
import threading
from pathlib import Path
from typing import Annotated

import msgspec
import zmq.utils.z85
from msgspec import Meta, Struct

from sglang_prfaas.config.schema import Name
from sglang_prfaas.errors import ConfigError

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 1 << 20

CurveKey = Annotated[str, Meta(min_length=40, max_length=40)]
Fingerprint = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$")]


class Peer(Struct, frozen=True, forbid_unknown_fields=True):
    """What is known of one site."""

    addresses: tuple[str, ...] = ()
    curve: tuple[CurveKey, ...] = ()
    certificates: tuple[Fingerprint, ...] = ()

    def is_at(self, host: str) -> bool:
        """Whether its servers are said to be at `host`, a name or an address."""
        try:
            address = ipaddress.ip_address(host.partition("%")[0])
        except ValueError:
            return host in self.addresses
        return any(network is not None and address in network for network in map(_network, self.addresses))


def fingerprint(der: bytes) -> str:
    """Of a certificate in DER, as `peers.toml` has it."""
    return f"sha256:{hashlib.sha256(der).hexdigest()}"


def read_peers(path: Path) -> dict[str, Peer]:
    """The sites in the file. Raises ConfigError with the path and what is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        peers = msgspec.toml.decode(data, type=dict[Name, Peer])
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    for site, peer in peers.items():
        for key in peer.curve:
            try:
                zmq.utils.z85.decode(key.encode())
            except (KeyError, ValueError, UnicodeEncodeError, struct.error):
                raise ConfigError(f"{path}: {site}.curve: {key!r} is no CURVE key in Z85") from None
    for what in ("curve", "certificates"):
        owners: dict[str, str] = {}
        for site, peer in peers.items():
            for key in getattr(peer, what):
                if owners.setdefault(key, site) != site:
                    raise ConfigError(f"{path}: {key!r} stands under {owners[key]} and {site}; a key proves one site")
    return peers


class PeerList:
    """The allow-list in a file, kept up to date. Raises ConfigError where it cannot be read at first; an unreadable one
    later is logged, and what was read before holds. Safe to use from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen = signature(path)
        self._peers = read_peers(path)

    def current(self) -> dict[str, Peer]:
        """The sites, read again where the file has changed."""
        with self._lock:
            now = signature(self.path)
            if now != self._seen:
                self._seen = now
                try:
                    self._peers = read_peers(self.path)
                    logger.info("prfaas: %s has changed; sites let in: %s", self.path, ", ".join(self._peers))
                except ConfigError as error:
                    logger.error("prfaas: peers as before, for now: %s", error)
            return self._peers

    def site_of_curve_key(self, key: str) -> str:
        """The site that a CURVE public key (Z85) belongs to, or an empty string."""
        return next((site for site, peer in self.current().items() if key in peer.curve), "")

    def site_of_certificate(self, der: bytes) -> str:
        """The site that a certificate (DER) belongs to, or an empty string."""
        digest = fingerprint(der)
        return next((site for site, peer in self.current().items() if digest in peer.certificates), "")


class Watch:
    """Tells one owner of connections when the list has changed. Not thread-safe.

    A change counts once two looks in a row have found the same list: a file that is just being written may lack sites,
    which refuses new connections for a moment, and must not cost those that stand."""

    def __init__(self, peers: PeerList | None) -> None:
        """peers: None where no keys are used; then nothing ever changes."""
        self._peers = peers
        self._seen = self._latest = peers.current() if peers is not None else {}

    def changed(self) -> bool:
        """Whether the list is another one than it was when this was true last. To be called a few times a second."""
        if self._peers is None:
            return False
        before, self._latest = self._latest, self._peers.current()
        if self._latest is not before or self._latest is self._seen:
            return False
        self._seen = self._latest
        return True

    def has_key(self, site: str, key: str) -> bool:
        """Whether a CURVE public key (Z85) stood under a site when `changed` was true last, or at the start."""
        return self._peers is None or key in self._seen.get(site, _NOBODY).curve

    def has_certificate(self, site: str, digest: str) -> bool:
        """The same of a certificate, by its fingerprint."""
        return self._peers is None or digest in self._seen.get(site, _NOBODY).certificates


_NOBODY = Peer()


def signature(*paths: Path) -> tuple[object, ...]:
    """Differs once one of the files does."""
    found: list[object] = []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as error:
            found.append(error.errno)
        else:
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return tuple(found)


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None  # a name
