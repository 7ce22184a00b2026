"""CURVE on ZeroMQ sockets (RFC 26), clients let in by ZAP (RFC 27), and what a socket's monitor tells of refusals."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable

import zmq
import zmq.utils.z85
from msgspec import Struct

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"prfaas"
ZAP_VERSION = b"1.0"
KEY_PROPERTY = "Prfaas-Key"
"""Property of messages: the CURVE public key (Z85) that their sender has proved. Its site is `User-Id`."""

HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Loss(Struct, frozen=True):
    """Why a connection that was dialled is gone. refused: by a peer that does not have, or does not accept, the key;
    certain: that can be told from one that broke in the handshake."""

    reason: str
    refused: bool
    certain: bool = True


def serve(sock: zmq.Socket[bytes], secret: bytes) -> None:
    """Demand CURVE of whoever connects. With no ZAP handler at hand, as in a loop that ends, nobody is let in."""
    sock.setsockopt(zmq.CURVE_SERVER, 1)
    sock.setsockopt(zmq.CURVE_SECRETKEY, secret)
    sock.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
    sock.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def dial(sock: zmq.Socket[bytes], public: bytes, secret: bytes, server: bytes) -> None:
    """Prove the own key, and demand `server` of whoever is dialled."""
    sock.setsockopt(zmq.CURVE_PUBLICKEY, public)
    sock.setsockopt(zmq.CURVE_SECRETKEY, secret)
    sock.setsockopt(zmq.CURVE_SERVERKEY, server)


def zap_answer(
    request: list[bytes], site_of: Callable[[str], str], refused: Callable[[str], None]
) -> list[bytes] | None:
    """The reply to one ZAP request, as it came to a ROUTER: with its return path in front. The user id of a client that
    is let in is its site. None for what is no request."""
    if b"" not in request:
        return None
    cut = request.index(b"") + 1
    path, body = request[:cut], request[cut:]
    if len(body) < 6 or body[0] != ZAP_VERSION:
        return None
    request_id, address, mechanism = body[1], body[3].decode(errors="replace"), body[5]
    reason = "no CURVE key"
    if mechanism == b"CURVE" and len(body) == 7 and len(body[6]) == 32:
        key = zmq.utils.z85.encode(body[6]).decode()
        site = site_of(key)
        if site:
            return [*path, ZAP_VERSION, request_id, b"200", b"", site.encode(), _property(KEY_PROPERTY, key)]
        reason = f"its key {key} is not in peers.toml"
    refused(f"control connection from {address} refused: {reason}")
    return [*path, ZAP_VERSION, request_id, b"400", b"unknown key", b"", b""]


def _property(name: str, value: str) -> bytes:
    """As ZMTP has metadata (RFC 23): the name with its length, the value with its own."""
    return struct.pack("!B", len(name)) + name.encode() + struct.pack("!I", len(value)) + value.encode()


def refused_client(event: int, value: int, *, keys: bool) -> str:
    """What a listening socket's monitor says of a client that failed the handshake; empty where it says nothing, or ZAP
    has said it."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and keys:
        return "it left during the handshake (without keys, or only to see whether the port is open)"
    if event != zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        return ""
    if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
        return "it has no keys" if keys else "it uses keys, and this side has none (transport.keys_dir)"
    if value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
        return "it expects another key of this server than its own (an old peers.toml, or another site's address)"
    return f"handshake broken (0x{value:x})"


def loss(event: int, value: int, site: str) -> Loss | None:
    """What a dialling socket's monitor says. `site`: whose key the server should have; empty without keys.

    Where the server has closed before all of its answer was read, there is less to say."""
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return Loss("it does not let this site's key in", True)
    if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            text = "it works without keys" if site else "it demands keys, and this side has none (transport.keys_dir)"
            return Loss(text, True)
        return Loss(f"handshake broken (0x{value:x})", True)
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        other = f"it does not hold the key of site {site}" if site else "it demands keys (transport.keys_dir)"
        return Loss(f"it closed during the handshake: {other}, or is about to end", True, False)
    if event == zmq.EVENT_DISCONNECTED:
        return Loss("it closed the control connection", False)
    return None


def peer_address(descriptor: int) -> tuple[str, int] | None:
    """Address and port of the peer at a connected descriptor of ZeroMQ's; None where it is closed by now."""
    sock = _same(descriptor)
    if sock is None:
        return None
    with sock:
        return _peer_of(sock)


def cut(descriptor: int, address: tuple[str, int] | None) -> bool:
    """End the connection at a descriptor of ZeroMQ's, if it is still that to `address`; returns whether it was. ZeroMQ
    cannot close a single connection of a socket: it then does so as if the peer had ended it."""
    sock = _same(descriptor)
    if sock is None:
        return False
    with sock:
        if address is None or _peer_of(sock) != address:
            return False
        try:
            sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False
        return True


def _same(descriptor: int) -> socket.socket | None:
    """Another name of a connection, under which it cannot become another one when ZeroMQ closes its own."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    try:
        return socket.socket(fileno=copy)
    except OSError:  # it is something else by now
        os.close(copy)
        return None


def _peer_of(sock: socket.socket) -> tuple[str, int] | None:
    try:
        name = sock.getpeername()
        return str(name[0]), int(name[1])
    except (OSError, IndexError, TypeError, ValueError):
        return None
