"""Blocking TCP sockets for chunks, plain or with TLS: tuning, listening, whole sends and whole receives."""

from __future__ import annotations

import socket
import ssl
import threading

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ConfigError, LocalError, PeerError, PeerGoneError
from sglang_prfaas.transport.security import PLAIN, Security
from sglang_prfaas.transport.security.tls import explain

TLS_RECORD_BYTES = 1 << 14
"""Plaintext of one TLS record at most (RFC 8446, section 5.1)."""
MAX_TLS_RECORDS = 1 << 24
"""Records sent with one set of keys; AES-GCM is sound for 2^24.5 (RFC 8446, section 5.5). `ssl` cannot update keys of a
connection, so that it is made anew."""


class Connection:
    """A data connection. One thread works with `sock` and closes it; any other may `cut` it, which wakes that thread.

    Nobody but the owner closes: a descriptor freed under a thread that is about to write could be another connection's
    by then.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.site = ""
        """The site that the peer has proved to belong to; empty without keys."""
        self._lock = threading.Lock()
        self._closed = False
        self.was_cut = False
        self.renewing = False
        """Whether it is the sender's last word that it be dialled again."""
        self._records = 0

    def count(self, nbytes: int) -> None:
        """So many more bytes were sent. By the owner."""
        self._records += -(-nbytes // TLS_RECORD_BYTES)

    @property
    def used_up(self) -> bool:
        """Whether its keys have protected as much as they may."""
        return self._records >= MAX_TLS_RECORDS and isinstance(self.sock, ssl.SSLSocket)

    def cut(self) -> None:
        """End the connection both ways. From any thread. Idempotent."""
        with self._lock:
            self.was_cut = True
            if self._closed:
                return
            try:
                # Not SSLSocket's: it drops the TLS state first, and a thread that sends would send plain bytes.
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
            except OSError:
                pass  # not connected, or not any more

    def wrap(self, security: Security) -> None:
        """Put TLS on a connection that was dialled, where there are keys. By the owner. Raises OSError."""
        with self._lock:
            self.sock = security.wrap(self.sock, server_side=False)

    def close(self) -> None:
        """Free the descriptor. By the owner. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.sock.close()


def tune(sock: socket.socket, config: TransportConfig) -> None:
    """Set what the configuration asks for. Raises ConfigError for a congestion control the kernel does not have."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if config.socket_buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.socket_buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, config.socket_buffer_bytes)
    if config.congestion_control:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, config.congestion_control.encode())
        except OSError as error:
            raise ConfigError(
                f"transport.congestion_control: the kernel has no {config.congestion_control!r} ({error.strerror}); "
                "load its module, or name one of /proc/sys/net/ipv4/tcp_available_congestion_control"
            ) from None


def listen(host: str, port: int, config: TransportConfig) -> socket.socket:
    """A listening socket at an address; port 0 takes any free one. Raises LocalError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        tune(sock, config)
        sock.bind((host, port))
        sock.listen(512)
    except (OSError, OverflowError) as error:
        sock.close()
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise LocalError(
            f"mover data port {port} on {host} cannot be used: {what}. Set mover_port to a free range, or 0."
        ) from None
    except ConfigError:
        sock.close()
        raise
    return sock


def unconnected(host: str, config: TransportConfig) -> Connection:
    """A tuned connection to be made with `connect`; it can be cut already. Raises ConfigError."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        tune(sock, config)
    except BaseException:
        sock.close()
        raise
    return Connection(sock)


def connect(
    connection: Connection, host: str, port: int, config: TransportConfig, security: Security = PLAIN, site: str = ""
) -> None:
    """Dial a data port, and with keys make sure that it belongs to `site`. Raises PeerGoneError when it cannot be
    reached within the handshake timeout, or was cut, PeerError for one that cannot prove its site."""
    try:
        connection.sock.settimeout(config.handshake_timeout_s)
        connection.sock.connect((host, port))
        connection.wrap(security)
    except OSError as error:
        raise PeerGoneError(f"data port {host}:{port} cannot be reached: {explain(error)}") from None
    try:
        connection.site = security.handshake(connection.sock)
    except PeerError as error:
        raise PeerError(f"data port {host}:{port}: {error}") from None
    if connection.site != site:
        raise PeerError(f"data port {host}:{port} belongs to site {connection.site}, expected {site}")
    connection.sock.settimeout(None)
    if connection.was_cut:
        raise PeerGoneError(f"data port {host}:{port}: given up while connecting")


def send_all(sock: socket.socket, *parts: bytes | memoryview) -> None:
    """Send all parts, in as few system calls as the kernel allows. Raises PeerGoneError."""
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    try:
        if isinstance(sock, ssl.SSLSocket):
            _send_records(sock, views)
            return
        while views:
            sent = sock.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views[0])
                views.pop(0)
            if views and sent:
                views[0] = views[0][sent:]
    except OSError as error:
        raise PeerGoneError(f"data connection lost while sending: {explain(error)}") from None


def _send_records(sock: ssl.SSLSocket, views: list[memoryview]) -> None:
    """Send over TLS: small parts share a record with the beginning of what follows, the rest is not copied."""
    head = bytearray()
    for view in views:
        taken = min(len(view), TLS_RECORD_BYTES - len(head))
        head += view[:taken]
        if taken < len(view):
            sock.sendall(head)
            sock.sendall(view[taken:])
            head = bytearray()
    if head:
        sock.sendall(head)


def receive_exactly(sock: socket.socket, view: memoryview) -> bool:
    """Fill `view`. Returns False where the peer closed before the first byte; raises PeerGoneError in between."""
    at = 0
    try:
        while at < len(view):
            count = sock.recv_into(view[at:])
            if count == 0:
                if at == 0:
                    return False
                raise PeerGoneError(f"data connection closed after {at} of {len(view)} bytes")
            at += count
    except OSError as error:
        raise PeerGoneError(f"data connection lost while receiving: {explain(error)}") from None
    return True
