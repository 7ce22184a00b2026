"""Host names and addresses, in the form that sockets and ZeroMQ endpoints need them."""

from __future__ import annotations

import ipaddress
import socket

from sglang_prfaas.core.addresses import base_url
from sglang_prfaas.errors import LocalError


def is_numeric(host: str) -> bool:
    """Whether `host` is an IPv4 or IPv6 address, with or without a scope."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def resolve(host: str) -> str:
    """The address of `host`: itself where it is one, every address for an empty one or `*`, else the first that its
    name stands for. May ask a name server. Raises LocalError."""
    host = host.strip("[]")
    if host in ("", "*"):
        return "0.0.0.0"
    if is_numeric(host):
        return host
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise LocalError(f"host {host!r} cannot be resolved: {error}") from None


def endpoint(host: str, port: int) -> str:
    """A ZeroMQ TCP endpoint; IPv6 addresses get their brackets."""
    return base_url("tcp", host, port)


def dialable(host: str) -> str:
    """The address to dial for one that was bound: a wildcard becomes the loopback of its family."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1", "*": "127.0.0.1"}.get(host, host)
