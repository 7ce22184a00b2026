"""What is said of a TLS connection that ends."""

from __future__ import annotations

import ssl

import pytest

from sglang_prfaas.transport.security.tls import certificate_refused, explain


def failed(reason: str) -> ssl.SSLError:
    error = ssl.SSLError(1, f"[SSL: {reason}] (_ssl.c:2427)")
    error.reason = reason
    return error


@pytest.mark.parametrize(
    ("reason", "text", "refused"),
    [
        ("SSLV3_ALERT_CERTIFICATE_EXPIRED", "refused this site's certificate or key (certificate expired)", True),
        ("TLSV1_ALERT_UNKNOWN_CA", "refused this site's certificate or key (unknown ca)", True),
        ("TLSV13_ALERT_CERTIFICATE_REQUIRED", "refused this site's certificate or key (certificate required)", False),
        ("SSLV3_ALERT_BAD_RECORD_MAC", "the other side ended it (bad record mac)", False),
        ("TLSV1_ALERT_INTERNAL_ERROR", "the other side ended it (internal error)", False),
        ("WRONG_VERSION_NUMBER", "it does not speak TLS (wrong version number)", False),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "it has no certificate", False),
    ],
)
def test_a_line_for_every_end(reason: str, text: str, refused: bool) -> None:
    """A flipped bit is no refused certificate: the connection is dialled again."""
    error = failed(reason)
    assert text in explain(error)
    assert certificate_refused(error) is refused
