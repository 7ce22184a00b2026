"""TLS 1.3 with certificates on both sides (RFC 8446), by the `ssl` module, for data connections."""

from __future__ import annotations

import ssl
from pathlib import Path


def server_context(ca: Path, certificate: Path, private_key: Path) -> ssl.SSLContext:
    """For the side that is dialled. Raises OSError, ssl.SSLError among them."""
    context = _context(ssl.PROTOCOL_TLS_SERVER, ca, certificate, private_key)
    context.num_tickets = 0  # a resumed session would not show its certificate again
    return context


def client_context(ca: Path, certificate: Path, private_key: Path) -> ssl.SSLContext:
    """For the side that dials. Raises OSError, ssl.SSLError among them.

    Host names are not compared: a certificate proves a site, by its fingerprint in peers.toml, at whatever address."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, ca, certificate, private_key)


def _context(protocol: ssl._SSLMethod, ca: Path, certificate: Path, private_key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca)
    context.load_cert_chain(certificate, private_key, password=_no_password)
    return context


def _no_password() -> str:
    """Called for an encrypted key; without it OpenSSL would ask on the terminal."""
    raise ssl.SSLError("the private key is encrypted; store it without a passphrase, readable by its owner only")


def self_handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> ssl.SSLObject:
    """Both ends in memory: raises ssl.SSLError where the certificates would not be accepted by a peer that has the same
    ones. Returns the client's end."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(to_client, to_server), server.wrap_bio(to_server, to_client, server_side=True)]
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass  # the other end's turn
    return ends[0]


def explain(error: OSError) -> str:
    """An error of a connection in words, without OpenSSL's source lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused: {error.verify_message}"
    if not isinstance(error, ssl.SSLError):
        return str(error)
    reason = error.reason or ""
    if reason in _NOT_TLS:
        return f"it does not speak TLS ({_words(reason)})"
    alert = reason.partition("_ALERT_")[2]
    if alert in _KEY_ALERTS or "CERTIFICATE" in alert:
        return f"the other side refused this site's certificate or key ({_words(alert)})"
    if alert:
        return f"the other side ended it ({_words(alert)})"
    if reason == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return "it has no certificate"
    return _words(reason) or str(error)


def certificate_refused(error: OSError) -> bool:
    """Whether it is the peer's alert about this side's certificate, which it will not take the next time either."""
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    return "_ALERT_" in reason and reason.endswith(_CERTIFICATE_ALERTS)


_CERTIFICATE_ALERTS = ("CERTIFICATE", "CERTIFICATE_EXPIRED", "CERTIFICATE_REVOKED", "CERTIFICATE_UNKNOWN", "UNKNOWN_CA")
"""RFC 8446, section 6.2."""


_KEY_ALERTS = ("HANDSHAKE_FAILURE", "DECRYPT_ERROR", "ACCESS_DENIED", "UNKNOWN_CA")
"""Besides those that have `CERTIFICATE` in their names."""


def _words(constant: str) -> str:
    return constant.lower().replace("_", " ")


_NOT_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNKNOWN_PROTOCOL", "UNSUPPORTED_PROTOCOL"}
"""What OpenSSL says of bytes that are no TLS record, or of TLS older than 1.3."""
