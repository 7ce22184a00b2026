"""Making keys: a certificate authority of a deployment, and a directory of keys for each of its sites.

    DIR/ca.crt, DIR/ca.key     the authority; its key signs new certificates, and stays where keys are made
    DIR/peers.toml             every site, with its addresses and public keys: the master copy
    DIR/SITE/                  what the machines of one site need; see `key_files`
    DIR/SITE/old/              its certificate and keys until `retire`, while they are exchanged

Secrets are written with mode 0600, directories with 0700. Nothing that exists is overwritten, but the copies of
peers.toml. `cryptography` is needed here only.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
import zmq
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.security.key_files import (
    CA,
    CERTIFICATE,
    CURVE_KEY,
    PEERS,
    PRIVATE_KEY,
    load_keys,
    read_curve_key,
)
from sglang_prfaas.transport.security.peers import Peer, fingerprint, read_peers

CA_KEY = "ca.key"
OLD = "old"
CA_DAYS = 3650
DEFAULT_DAYS = 730
BACKDATED = datetime.timedelta(hours=1)
"""Certificates begin to hold this long ago, for clocks that are behind."""

_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEADER = """\
# Which sites may connect, and what proves them. `launch keys` writes this file; addresses may be edited in the copy
# beside ca.crt. Ranks read their copy again when it changes.
"""


def make_keys(
    directory: Path, sites: Mapping[str, tuple[str, ...]], *, days: int = DEFAULT_DAYS, now: datetime.datetime
) -> list[str]:
    """Make the authority and the keys of `sites` (with the addresses of each; none: as they are, or anywhere), where
    they do not exist yet, and give every site the same peers.toml. Returns a line for each thing done.

    Raises ConfigError for a name that is none, and where files are missing or do not fit."""
    done: list[str] = []
    for site in sites:
        if not _SITE.fullmatch(site) or site in (CA, CA_KEY, PEERS):
            raise ConfigError(f"{site!r} cannot name a site; write letters, digits, '.', '_' or '-', at most 64")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    _authority(directory, now, done)
    for site in sites:
        _site(directory, site, days, now, done)
    _share(directory, sites, done)
    return done


def roll(directory: Path, site: str, *, days: int = DEFAULT_DAYS, now: datetime.datetime) -> list[str]:
    """New keys for a site that has some; the old ones go to `old` and count until `retire`. Raises ConfigError."""
    home, old = directory / site, directory / site / OLD
    if not (home / CURVE_KEY).is_file():
        raise ConfigError(f"{directory}: there is no site {site}; make it with --site {site}")
    if old.exists():
        raise ConfigError(f"{old} exists: an exchange is under way; end it with --retire {site}")
    old.mkdir(mode=0o700)
    for name in (CERTIFICATE, PRIVATE_KEY, CURVE_KEY):
        os.rename(home / name, old / name)
    done = [f"moved the keys of {site} to {old}"]
    _site(directory, site, days, now, done)
    _share(directory, {}, done)
    return done


def retire(directory: Path, site: str) -> list[str]:
    """Delete a site's old keys; they are let in no longer. Raises ConfigError where there are none."""
    old = directory / site / OLD
    if not old.is_dir():
        raise ConfigError(f"{old}: no such directory; there is nothing to retire")
    for name in (CERTIFICATE, PRIVATE_KEY, CURVE_KEY):
        (old / name).unlink(missing_ok=True)
    old.rmdir()
    done = [f"deleted {old}"]
    _share(directory, {}, done)
    return done


def _authority(directory: Path, now: datetime.datetime, done: list[str]) -> None:
    certificate, key = directory / CA, directory / CA_KEY
    if certificate.exists() and key.exists():
        return
    if certificate.exists() or key.exists():
        there, missing = (certificate, key) if certificate.exists() else (key, certificate)
        raise ConfigError(f"{there} exists without {missing.name}; restore it, or begin in an empty directory")
    private = ec.generate_private_key(ec.SECP256R1())
    name = _name("sglang-prfaas deployment")
    identifier = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    signed = (
        _builder(name, name, private.public_key(), CA_DAYS, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(private, hashes.SHA256())
    )
    _write_new(key, _pem(private), 0o600)
    _write_new(certificate, signed.public_bytes(serialization.Encoding.PEM), 0o644)
    done.append(f"made the authority {certificate}, its key {key}")


def _site(directory: Path, site: str, days: int, now: datetime.datetime, done: list[str]) -> None:
    """Whatever a site does not have yet. Its certificate, key and CURVE key come together."""
    home = directory / site
    files = [home / name for name in (CERTIFICATE, PRIVATE_KEY, CURVE_KEY)]
    there = [path for path in files if path.exists()]
    if len(there) == len(files):
        done.append(f"site {site} has its keys in {home}")
        return
    if there:
        raise ConfigError(
            f"{home} has {', '.join(path.name for path in there)} but not all of {CERTIFICATE}, {PRIVATE_KEY}, "
            f"{CURVE_KEY}; restore the missing ones, or move the rest away"
        )
    home.mkdir(exist_ok=True, mode=0o700)
    try:
        authority = x509.load_pem_x509_certificate((directory / CA).read_bytes())
        signer = serialization.load_pem_private_key((directory / CA_KEY).read_bytes(), password=None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{directory}: {CA} or {CA_KEY} cannot be used: {error}") from None
    if not isinstance(signer, ec.EllipticCurvePrivateKey) or signer.public_key() != authority.public_key():
        raise ConfigError(f"{directory}: {CA_KEY} is not the key of {CA}")
    private = ec.generate_private_key(ec.SECP256R1())
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    public = private.public_key()
    certificate = (
        _builder(_name(site), authority.subject, public, days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(site)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write_new(home / PRIVATE_KEY, _pem(private), 0o600)
    _write_new(home / CERTIFICATE, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    _write_new(home / CURVE_KEY, zmq.curve_keypair()[1] + b"\n", 0o600)
    done.append(f"made the keys of site {site} in {home}; the certificate holds for {days} days")


def _share(directory: Path, addresses: Mapping[str, tuple[str, ...]], done: list[str]) -> None:
    """Bring the master copy of peers.toml up to date, and every site's copy of it and of the authority."""
    master = directory / PEERS
    before = read_peers(master) if master.exists() else {}
    homes = sorted(path.parent for path in directory.glob(f"*/{CURVE_KEY}"))
    peers: dict[str, Peer] = {}
    for home in homes:
        held = [home, home / OLD] if (home / OLD / CURVE_KEY).exists() else [home]
        known = before.get(home.name, Peer())
        peers[home.name] = Peer(
            addresses.get(home.name, ()) or known.addresses,
            tuple(read_curve_key(path / CURVE_KEY)[0].decode() for path in held),
            tuple(_fingerprint(path / CERTIFICATE) for path in held),
        )
    text = _HEADER + "".join(_section(site, peer) for site, peer in peers.items())
    for path in (master, *(home / PEERS for home in homes)):
        if not path.exists() or path.read_text() != text:
            _replace(path, text.encode(), 0o644)
            done.append(f"wrote {path}")
    for home in homes:
        if not (home / CA).exists():
            _write_new(home / CA, (directory / CA).read_bytes(), 0o644)
        load_keys(home)


def _section(site: str, peer: Peer) -> str:
    lines = [f"{key} = {_toml(getattr(peer, key))}" for key in ("addresses", "curve", "certificates")]
    return "\n".join([f"\n[{_toml(site)}]", *lines, ""])


def _toml(value: str | tuple[str, ...]) -> str:
    """A string, or a list of strings, in TOML: JSON's form is valid for both."""
    return msgspec.json.encode(value).decode()


def _fingerprint(path: Path) -> str:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is no certificate: {error}") from None
    return fingerprint(certificate.public_bytes(serialization.Encoding.DER))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int, now: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(private: ec.EllipticCurvePrivateKey) -> bytes:
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_new(path: Path, data: bytes, mode: int) -> None:
    """Create a file that does not exist, never readable by more than `mode` says. Raises FileExistsError."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Whoever reads the file meanwhile gets all of the old or all of the new."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    _write_new(temporary, data, mode)
    os.replace(temporary, path)
