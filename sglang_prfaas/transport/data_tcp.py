"""Plain blocking TCP sockets for chunks: tuning, listening, whole sends and whole receives."""

from __future__ import annotations

import socket

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ConfigError, LocalError, PeerGoneError


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
    """A listening socket; port 0 takes any free one. Raises LocalError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host == "::":
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        tune(sock, config)
        sock.bind((host or "0.0.0.0", port))
        sock.listen(512)
    except OSError as error:
        sock.close()
        raise LocalError(
            f"mover data port {port} on {host} cannot be used: {error.strerror}. Set mover_port to a free range, or 0."
        ) from None
    except ConfigError:
        sock.close()
        raise
    return sock


def connect(host: str, port: int, config: TransportConfig) -> socket.socket:
    """Dial a data port. Raises PeerGoneError when it cannot be reached within the handshake timeout."""
    try:
        sock = socket.create_connection((host, port), timeout=config.handshake_timeout_s)
    except OSError as error:
        raise PeerGoneError(f"data port {host}:{port} cannot be reached: {error}") from None
    try:
        tune(sock, config)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def send_all(sock: socket.socket, *parts: bytes | memoryview) -> None:
    """Send all parts, in as few system calls as the kernel allows. Raises PeerGoneError."""
    views = [memoryview(part).cast("B") for part in parts if len(part)]
    try:
        while views:
            sent = sock.sendmsg(views)
            while views and sent >= len(views[0]):
                sent -= len(views[0])
                views.pop(0)
            if views and sent:
                views[0] = views[0][sent:]
    except OSError as error:
        raise PeerGoneError(f"data connection lost while sending: {error}") from None


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
        raise PeerGoneError(f"data connection lost while receiving: {error}") from None
    return True


def close(sock: socket.socket) -> None:
    """Shut down and close: a thread blocked in this socket wakes up."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # not connected any more
    sock.close()
