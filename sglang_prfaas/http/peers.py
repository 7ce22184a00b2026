"""Mutual TLS on HTTP: what each side shows, and whom it takes."""

from __future__ import annotations

import ssl
from typing import Protocol


class TlsPeers(Protocol):
    """One side of connections on which both ends show a certificate."""

    def context(self) -> ssl.SSLContext:
        """For the next connection, or, where connections are accepted, for the port they come to. Raises ConfigError
        for files that do not fit."""

    def check(self, certificate: bytes) -> None:
        """Look at what the other end has proved to be (DER, RFC 5280). Raises PeerError for one that is not let in."""
