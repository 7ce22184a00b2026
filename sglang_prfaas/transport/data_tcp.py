"""TCP sockets for chunks, plain or with TLS: tuning, listening, dialling, vectored sends and receives."""

from __future__ import annotations

import array
import fcntl
import itertools
import select
import socket
import ssl
import struct
import termios
import threading
from collections.abc import Callable

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import ConfigError, LocalError, PeerClosedError, PeerError, PeerGoneError, PortRefusedError
from sglang_prfaas.transport import tcp_info
from sglang_prfaas.transport.link_tuning import set_congestion_control
from sglang_prfaas.transport.security import PLAIN, Security
from sglang_prfaas.transport.security.tls import certificate_refused, explain
from sglang_prfaas.transport.tcp_info import TcpInfo

TLS_RECORD_BYTES = 1 << 14
"""Plaintext of one TLS record at most (RFC 8446, section 5.1)."""
TLS_BLOCK_BYTES = 8 * TLS_RECORD_BYTES
"""Taken at a time to be encrypted."""
MAX_TLS_RECORDS = 1 << 24
"""Records sent with one set of keys; AES-GCM is sound for 2^24.5 (RFC 8446, section 5.5). `ssl` cannot update keys of a
connection, so that it is made anew."""


SO_MAX_PACING_RATE = 47
"""Of Linux (asm-generic/socket.h); bytes a second, an unsigned long."""

_NOW = int(socket.MSG_DONTWAIT)
_NOW_AND_MORE = int(socket.MSG_DONTWAIT | socket.MSG_MORE)
_numbers = itertools.count()


class Connection:
    """A data connection. Its owner closes it; any other thread may `cut` it, which wakes whoever waits for it.

    Nobody but the owner closes: a descriptor freed under a thread that is about to write could be another connection's
    by then. One thread may send while another receives. Once `unblock` was called, nothing here waits but `wait`.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.tls = isinstance(sock, ssl.SSLSocket)
        self.number = next(_numbers)
        """Of no other connection of this process."""
        self.site = ""
        """The site that the peer has proved to belong to; empty without keys."""
        self.certificate = ""
        """Fingerprint of the certificate that it has proved it with."""
        self._lock = threading.Lock()
        self._tls_lock = threading.Lock()
        """OpenSSL lets nobody read a connection while another writes to it."""
        self._outgoing = b""
        """With TLS: bytes taken from the caller that have yet to leave."""
        self._closed = False
        self.was_cut = False
        self.sent_bytes = 0
        self._records = 0
        self._pollers: dict[bool, select.poll] = {}

    @property
    def used_up(self) -> bool:
        """Whether its keys have protected as much as they may."""
        return self.tls and self._records >= MAX_TLS_RECORDS

    def unblock(self, *, receiving: bool = False) -> None:
        """From here on nothing waits, but where it is asked to. `receiving`: `receive` may be. By the owner."""
        self.sock.setblocking(receiving and not self.tls)

    @property
    def same_host(self) -> bool:
        """Whether both ends are on this host; also where it does not stand any more."""
        try:
            return bool(self.sock.getpeername()[0] == self.sock.getsockname()[0])
        except OSError:
            return True

    def send(self, views: list[memoryview], *, more: bool = False) -> int:
        """Take bytes to be sent; returns how many, 0 where it would have to wait. more: there is more to come at once.
        Raises PeerGoneError."""
        try:
            if not self.tls:
                sent = self.sock.sendmsg(views, (), _NOW_AND_MORE if more else _NOW)
            elif self._flush():
                # A copy: OpenSSL wants the same bytes again where it could not send them, and pages may end before.
                self._outgoing = _joined(views)
                sent = len(self._outgoing)
                self._flush()
            else:
                sent = 0
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise _gone("sending", error) from None
        self.sent_bytes += sent
        return sent

    def send_with(self, act: Callable[[int], int]) -> int:
        """Have `act` send through the descriptor, and return as `send` does; not with TLS. Raises PeerGoneError."""
        try:
            sent = act(self.sock.fileno())
        except OSError as error:
            raise _gone("sending", error) from None
        self.sent_bytes += sent
        return sent

    def flush(self) -> bool:
        """Whether all that was taken has left. Raises PeerGoneError."""
        try:
            return not self.tls or self._flush()
        except OSError as error:
            raise _gone("sending", error) from None

    def _flush(self) -> bool:
        with self._tls_lock:
            while self._outgoing:
                try:
                    count = self.sock.send(self._outgoing)
                except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
                    return False
                self._records += -(-count // TLS_RECORD_BYTES)
                self._outgoing = self._outgoing[count:]
            return True

    def receive(self, views: list[memoryview], *, wait: bool = False) -> int | None:
        """Fill views from the front; returns how many bytes came, 0 at the end, None where it would have to wait. With
        `wait`, and no TLS, it does, for what `want` says. Raises PeerGoneError."""
        try:
            if not self.tls:
                return self.sock.recvmsg_into(views, 0, 0 if wait else _NOW)[0]
            return self._receive_records(views)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise _gone("receiving", error) from None

    def receive_with(self, act: Callable[[int], int | None]) -> int | None:
        """Have `act` receive from the descriptor, and return as `receive` does; not with TLS. Raises PeerGoneError."""
        try:
            return act(self.sock.fileno())
        except OSError as error:
            raise _gone("receiving", error) from None

    def _receive_records(self, views: list[memoryview]) -> int | None:
        total = 0
        with self._tls_lock:
            for view in views:
                at = 0
                while at < len(view):
                    try:
                        count = self.sock.recv_into(view[at:])
                    except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                        return total or None
                    if count == 0:
                        return total
                    at += count
                    total += count
        return total

    def want(self, nbytes: int) -> None:
        """Let a wait return only when so many bytes have come, the end, or an error; less wakes it for nothing."""
        if not self.tls and nbytes != self._low_water:
            self._low_water = nbytes
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, nbytes)

    _low_water = 1

    def wait(self, *, write: bool, timeout_s: float | None = None) -> bool:
        """Wait until more can be sent or received, or the connection has ended. Returns False after `timeout_s`. One
        thread may wait for either."""
        poller = self._pollers.get(write)
        if poller is None:
            poller = self._pollers[write] = select.poll()
            poller.register(self.sock, select.POLLOUT if write else select.POLLIN)
        return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))

    def unsent_bytes(self) -> int:
        """Bytes that the peer's kernel has not acknowledged."""
        with self._lock:
            if self._closed:
                return 0
            buffer = array.array("i", [0])
            fcntl.ioctl(self.sock.fileno(), termios.TIOCOUTQ, buffer)
            return buffer[0]

    def unless_closed(self, act: Callable[[int], bool]) -> bool:
        """Do something with its descriptor, which stays its own meanwhile; False where it has none any more. From any
        thread."""
        with self._lock:
            return not self._closed and act(self.sock.fileno())

    @property
    def closed(self) -> bool:
        """Whether its descriptor is free."""
        return self._closed

    def tcp_info(self) -> TcpInfo | None:
        """What the kernel knows of it; None where the system does not tell, or it is closed. From any thread."""
        with self._lock:
            return None if self._closed else tcp_info.read(self.sock)

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
            self.tls = isinstance(self.sock, ssl.SSLSocket)

    def close(self) -> None:
        """Free the descriptor. By the owner. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.sock.close()


def _gone(doing: str, error: OSError) -> PeerError:
    if certificate_refused(error):
        return PeerError(f"data connection refused: {explain(error)}")
    closed = isinstance(error, (ConnectionResetError, BrokenPipeError, ssl.SSLEOFError, ssl.SSLZeroReturnError))
    kind = PeerClosedError if closed else PeerGoneError
    return kind(f"data connection lost while {doing}: {explain(error)}")


def tune(sock: socket.socket, config: TransportConfig) -> None:
    """Set what the configuration, as it holds for the link, asks for. Raises ConfigError for a congestion control the
    kernel does not have."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if config.socket_buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.socket_buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, config.socket_buffer_bytes)
    if config.congestion_control:
        set_congestion_control(sock, config.congestion_control)
    if config.pacing_mbps:
        rate = int(config.pacing_mbps * 1e6 / 8 / config.connections)
        sock.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, struct.pack("@L", rate))


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
    connection: Connection,
    host: str,
    port: int,
    timeout_s: float,
    security: Security = PLAIN,
    site: str = "",
) -> None:
    """Dial a data port, and with keys make sure that it belongs to `site`. Raises PeerGoneError when it cannot be
    reached within the timeout, or was cut, PortRefusedError where nothing listens, PeerError for one that cannot prove
    its site."""
    where = f"data port {authority(host, port)}"
    try:
        connection.sock.settimeout(timeout_s)
        connection.sock.connect((host, port))
        connection.wrap(security)
    except ConnectionRefusedError as error:
        raise PortRefusedError(f"{where} cannot be reached: {explain(error)}") from None
    except OSError as error:
        raise PeerGoneError(f"{where} cannot be reached: {explain(error)}") from None
    try:
        connection.site, connection.certificate = security.handshake(connection.sock)
    except PeerGoneError as error:
        raise PeerGoneError(f"{where}: {error}") from None
    except PeerError as error:
        raise PeerError(f"{where}: {error}") from None
    if connection.site != site:
        raise PeerError(f"{where} belongs to site {connection.site}, expected {site}")
    if connection.was_cut:
        raise PeerGoneError(f"{where}: given up while connecting")


def _joined(views: list[memoryview]) -> bytes:
    """The first bytes of `views`, up to TLS_BLOCK_BYTES."""
    parts: list[memoryview] = []
    room = TLS_BLOCK_BYTES
    for view in views:
        parts.append(view[:room])
        room -= len(parts[-1])
        if not room:
            break
    return b"".join(parts)


def receive_exactly(sock: socket.socket, view: memoryview) -> bool:
    """Fill `view` from a blocking socket. Returns False where the peer closed before the first byte; raises
    PeerGoneError in between."""
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
