"""The keys of one site, as files in one directory: reading them, and checking that they fit together.

ca.crt       whose signatures count (PEM)
site.crt     this site's certificate (PEM, with intermediate ones where there are any)
site.key     its private key (PEM)
curve.key    this site's CURVE secret key, Z85 (RFC 26, RFC 32): 40 characters
peers.toml   the sites that may connect, this one included; see `peers`
"""

from __future__ import annotations

import os
import ssl
import stat
from pathlib import Path

import zmq
from msgspec import Struct

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.security.peers import Peer, PeerList, fingerprint
from sglang_prfaas.transport.security.tls import client_context, explain, self_handshake, server_context

CA, CERTIFICATE, PRIVATE_KEY, CURVE_KEY, PEERS = "ca.crt", "site.crt", "site.key", "curve.key", "peers.toml"
NAMES = (CA, CERTIFICATE, PRIVATE_KEY, CURVE_KEY, PEERS)
SECRET = (PRIVATE_KEY, CURVE_KEY)
EXPIRES_SOON_S = 30 * 86400.0

_AGAIN = "copy the site's whole directory again from where `launch keys` made it"
_VERIFY_HINTS = {
    9: "look at this machine's clock",
    10: "make a new one where the keys were made, launch keys DIR --roll SITE, and copy the directory; or look at this "
    "machine's clock",
}
"""By X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL's x509_vfy.h."""
_OWNER = "the user that runs the servers must own it, run chown on it"


class KeyFiles(Struct, frozen=True):
    """Keys that were read and fit together. `site`: whose they are, by peers.toml."""

    directory: Path
    site: str
    curve_public: bytes
    curve_secret: bytes
    peers: PeerList
    expires_unix_s: float
    """When the certificate expires."""

    def __repr__(self) -> str:
        return f"KeyFiles({str(self.directory)!r}, site {self.site!r})"


def load_keys(directory: Path) -> KeyFiles:
    """Read a site's keys. Raises ConfigError with everything that is missing, expired or does not fit."""
    try:
        missing = [name for name in NAMES if not (directory / name).is_file()]
    except PermissionError:
        raise ConfigError(f"{directory} cannot be entered: Permission denied; {_OWNER}") from None
    if missing:
        raise ConfigError(
            f"{directory}: no file {', '.join(missing)}; make keys with `python -m sglang_prfaas.launch keys`, and "
            "copy the whole directory of the site"
        )
    public, secret = read_curve_key(directory / CURVE_KEY)
    peers = PeerList(directory / PEERS)
    der, expires_unix_s = _certificate(directory)
    text = public.decode()
    site = peers.site_of_curve_key(text)
    if not site:
        raise ConfigError(f"{directory}: {PEERS} has no site with the public key of {CURVE_KEY}, {text}; {_AGAIN}")
    if peers.site_of_certificate(der) != site:
        raise ConfigError(
            f"{directory}: {PEERS} does not have {CERTIFICATE} under {site}: {fingerprint(der)}; {_AGAIN}"
        )
    return KeyFiles(directory, site, public, secret, peers, expires_unix_s)


def warnings(keys: KeyFiles, now_unix_s: float) -> list[str]:
    """What is allowed but should not stay: secrets that others can read, a certificate about to expire."""
    found = []
    for name in SECRET:
        path = keys.directory / name
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if mode & 0o077:
            found.append(f"{path} can be read by others (mode {mode:04o}); run chmod 600 on it")
    left_s = keys.expires_unix_s - now_unix_s
    if left_s < EXPIRES_SOON_S:
        path = keys.directory / CERTIFICATE
        found.append(
            f"{path} expires in {max(0.0, left_s) / 86400:.1f} days; make a new one: launch keys DIR --roll {keys.site}"
        )
    return found


def missing_peers(keys: KeyFiles, others: dict[str, KeyFiles]) -> list[str]:
    """Which of `others`, by site, these keys would not let in."""
    listed = keys.peers.current()
    found = []
    for site, other in others.items():
        if other.curve_public.decode() not in listed.get(site, Peer()).curve:
            found.append(f"{keys.peers.path} does not let site {site} in with the key in {other.directory}")
    return found


def read_curve_key(path: Path) -> tuple[bytes, bytes]:
    """Public and secret key, Z85. Raises ConfigError."""
    try:
        secret = path.read_bytes().strip()
        if len(secret) != 40:
            raise ConfigError(f"{path}: {len(secret)} characters, expected a CURVE secret key of 40 in Z85")
        return zmq.curve_public(secret), secret
    except OSError as error:
        hint = f"; {_OWNER}" if isinstance(error, PermissionError) else ""
        raise ConfigError(f"{path} cannot be read: {error.strerror}{hint}") from None
    except zmq.ZMQError:
        raise ConfigError(f"{path}: no CURVE secret key in Z85") from None


def _certificate(directory: Path) -> tuple[bytes, float]:
    """The certificate in DER and when it expires, after a handshake of it with itself. Raises ConfigError."""
    ca, certificate, private_key = (directory / name for name in (CA, CERTIFICATE, PRIVATE_KEY))
    try:
        ours = self_handshake(
            server_context(ca, certificate, private_key), client_context(ca, certificate, private_key)
        )
    except ssl.SSLCertVerificationError as error:
        what_to_do = _VERIFY_HINTS.get(error.verify_code, _AGAIN)
        raise ConfigError(f"{directory}: {CERTIFICATE} is refused: {error.verify_message}; {what_to_do}") from None
    except ssl.SSLError as error:
        raise ConfigError(
            f"{directory}: {CERTIFICATE}, {PRIVATE_KEY} and {CA} do not fit together: {explain(error)}; {_AGAIN}"
        ) from None
    except OSError as error:
        hint = f"; {_OWNER}" if isinstance(error, PermissionError) else ""
        text = f"{CERTIFICATE}, {PRIVATE_KEY} or {CA} cannot be read: {error.strerror or error}{hint}"
        raise ConfigError(f"{directory}: {text}") from None
    der, details = ours.getpeercert(binary_form=True), ours.getpeercert()
    assert der is not None, "a verified peer has a certificate"
    assert details is not None
    return der, float(ssl.cert_time_to_seconds(str(details["notAfter"])))
