"""Whether keys are used: from the configuration, and from where a port can be reached."""

from __future__ import annotations

import ipaddress
import logging
import socket
import ssl
import threading
import time
from pathlib import Path

import zmq

from sglang_prfaas.config.schema import ReportsConfig, TransportConfig
from sglang_prfaas.config.security import NO_KEYS, uses_keys
from sglang_prfaas.errors import ConfigError, PeerError, PeerGoneError
from sglang_prfaas.transport.security import curve, key_files
from sglang_prfaas.transport.security.key_files import KeyFiles, load_keys
from sglang_prfaas.transport.security.peers import Watch, fingerprint, signature
from sglang_prfaas.transport.security.server_keys import ServerKey
from sglang_prfaas.transport.security.tls import client_context, explain, server_context

logger = logging.getLogger(__name__)


class Security:
    """The keys of this rank, or their absence (`keys` None): the same calls either way. Safe to use from any thread."""

    def __init__(self, keys: KeyFiles | None = None) -> None:
        self.keys = keys
        self._lock = threading.Lock()
        self._seen: tuple[object, ...] = ()
        self._contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None
        if keys is not None:
            self._current_contexts()

    @property
    def site(self) -> str:
        """The site that the keys belong to, empty without any."""
        return self.keys.site if self.keys else ""

    def watch(self) -> Watch:
        """Tells when the allow-list changes."""
        return Watch(self.keys.peers if self.keys is not None else None)

    # --- ZeroMQ ---------------------------------------------------------------------------------------------------

    def serve(self, sock: zmq.Socket[bytes]) -> None:
        """Prepare a socket that is going to be bound."""
        if self.keys is not None:
            curve.serve(sock, self.keys.curve_secret)

    def dial(self, sock: zmq.Socket[bytes], server: ServerKey) -> None:
        """Prepare a socket that is going to dial a server with the key `server`."""
        if self.keys is not None:
            curve.dial(sock, self.keys.curve_public, self.keys.curve_secret, server.public)

    @property
    def own_server_key(self) -> ServerKey:
        """For servers of the own site."""
        return ServerKey(self.keys.site, self.keys.curve_public) if self.keys else ServerKey("", b"")

    def server_keys(self, host: str) -> tuple[ServerKey, ...]:
        """Keys that a server at `host` may have: those of the sites that peers.toml has there, else of the sites that
        may be anywhere."""
        if self.keys is None:
            return (self.own_server_key,)
        peers = self.keys.peers.current()
        known = {site: peer for site, peer in peers.items() if peer.is_at(host)}
        known = known or {site: peer for site, peer in peers.items() if not peer.addresses}
        return tuple(ServerKey(site, key.encode()) for site, peer in known.items() for key in peer.curve)

    def site_keys(self, site: str) -> tuple[ServerKey, ...]:
        """Keys that servers of a site may have by peers.toml, wherever they are; none for a site that is not in it."""
        if self.keys is None:
            return (self.own_server_key,)
        peer = self.keys.peers.current().get(site)
        return tuple(ServerKey(site, key.encode()) for key in peer.curve) if peer is not None else ()

    # --- data connections -----------------------------------------------------------------------------------------

    def wrap(self, sock: socket.socket, *, server_side: bool) -> socket.socket:
        """The socket that speaks TLS on the same connection; the handshake is yet to come. Raises OSError."""
        if self.keys is None:
            return sock
        context = self._current_contexts()[0 if server_side else 1]
        return context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)

    def handshake(self, sock: socket.socket) -> tuple[str, str]:
        """Shake hands on a wrapped socket, and return the peer's site and its certificate's fingerprint: empty without
        keys. Raises PeerError for a peer that is not let in, ssl.SSLWantReadError and ssl.SSLWantWriteError where the
        socket does not block."""
        if not isinstance(sock, ssl.SSLSocket) or self.keys is None:
            return "", ""
        try:
            sock.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except OSError as error:
            raise PeerGoneError(f"TLS handshake failed: {explain(error)}") from None
        der = sock.getpeercert(binary_form=True) or b""
        site = self.keys.peers.site_of_certificate(der)
        if not site:
            raise PeerError(f"its certificate {fingerprint(der)} is not in peers.toml")
        return site, fingerprint(der)

    def context(self, *, listens: bool) -> ssl.SSLContext:
        """For the side that is dialled, or the one that dials; with the files of now. Only with keys."""
        return self._current_contexts()[0 if listens else 1]

    def _current_contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        """Server's and client's, made anew where the files have changed; the old ones hold where that fails."""
        assert self.keys is not None
        files = [self.keys.directory / n for n in (key_files.CA, key_files.CERTIFICATE, key_files.PRIVATE_KEY)]
        with self._lock:
            now = signature(*files)
            if now != self._seen or self._contexts is None:
                self._seen = now
                try:
                    self._contexts = server_context(*files), client_context(*files)
                except OSError as error:
                    if self._contexts is None:
                        raise ConfigError(f"{self.keys.directory}: {explain(error)}") from None
                    logger.error("prfaas: certificates as before, for now: %s: %s", files[1], explain(error))
            return self._contexts

    # --- rule -----------------------------------------------------------------------------------------------------

    def may_listen(
        self, what: str, host: str, config: TransportConfig, risk: str = "can read and forge KVCache"
    ) -> None:
        """Without keys, only on this machine, unless the configuration says `off` in so many words: that is logged.

        `host` is an address; `risk`: what whoever reaches it can do, for the log. Raises ConfigError."""
        if self.keys is not None or ipaddress.ip_address(host.partition("%")[0]).is_loopback:
            return
        if config.security != "off":
            raise ConfigError(f"{what} would listen on {host}, {NO_KEYS}")
        logger.warning(
            'prfaas: %s listens on %s with transport.security = "off": whoever reaches it %s',
            what,
            host,
            risk,
        )


PLAIN = Security()
"""Without keys."""


def load_security(config: TransportConfig | ReportsConfig) -> Security:
    """What the configuration asks for. Logs what should not stay. Raises ConfigError for keys that do not fit."""
    if not uses_keys(config):
        return PLAIN
    keys = load_keys(Path(config.keys_dir))
    for text in key_files.warnings(keys, time.time()):
        logger.warning("prfaas: %s", text)
    return Security(keys)
