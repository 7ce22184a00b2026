"""HTTP between sites with the keys of the movers: certificates on both sides, of sites in peers.toml."""

from __future__ import annotations

import ssl

from sglang_prfaas.errors import ConfigError, PeerError
from sglang_prfaas.transport.security.peers import fingerprint
from sglang_prfaas.transport.security.policy import Security


class SiteTls:
    """What an HTTP server or client of this site shows and takes (`http.TlsPeers`). Both files and allow-list hold for
    every new connection as they are by then."""

    def __init__(self, security: Security, *, listens: bool, site: str = "") -> None:
        """site: the only one that the other end may be; empty for every site in peers.toml. Raises ConfigError without
        keys."""
        if security.keys is None:
            raise ConfigError("HTTP with certificates needs keys; see `python -m sglang_prfaas.launch keys --help`")
        self._security, self._peers = security, security.keys.peers
        self._listens, self._site = listens, site

    def context(self) -> ssl.SSLContext:
        """TLS 1.3, with a certificate asked of the other end."""
        context = self._security.context(listens=self._listens)
        if self._listens:
            context.sni_callback = self._renew
        return context

    def check(self, certificate: bytes) -> None:
        """Raises PeerError."""
        site = self._peers.site_of_certificate(certificate)
        if not site:
            raise PeerError(f"its certificate {fingerprint(certificate)} is not in peers.toml")
        if self._site and site != self._site:
            raise PeerError(f"it is of site {site}, expected {self._site}")

    def _renew(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Called in each handshake: a port is opened once, certificates are exchanged while it is."""
        connection.context = self._security.context(listens=True)
