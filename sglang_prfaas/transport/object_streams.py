"""Whole views over a socket within a deadline, whatever the pace of the other side."""

from __future__ import annotations

import socket

from sglang_prfaas.clock import Deadline
from sglang_prfaas.errors import DeadlineError, PeerGoneError
from sglang_prfaas.transport.security.tls import explain

SEND_BYTES = 1 << 20


def receive(sock: socket.socket, view: memoryview, deadline: Deadline, *, may_end: bool = False) -> bool:
    """Fill `view`. False where the peer has closed before the first byte and `may_end`. Raises DeadlineError,
    PeerGoneError."""
    at = 0
    while at < len(view):
        try:
            sock.settimeout(_left_s(deadline))
            count = sock.recv_into(view[at:])
        except TimeoutError:
            raise DeadlineError(f"{at} of {len(view)} bytes came within {deadline.budget_s:.3g} s") from None
        except OSError as error:
            raise PeerGoneError(f"connection lost while receiving: {explain(error)}") from None
        if not count:
            if may_end and not at:
                return False
            raise PeerGoneError(f"connection closed after {at} of {len(view)} bytes")
        at += count
    return True


def send(sock: socket.socket, view: memoryview, deadline: Deadline) -> None:
    """Send all of `view`. Raises DeadlineError, PeerGoneError."""
    at = 0
    while at < len(view):
        try:
            sock.settimeout(_left_s(deadline))
            at += sock.send(view[at : at + SEND_BYTES])
        except TimeoutError:
            raise DeadlineError(f"{at} of {len(view)} bytes left within {deadline.budget_s:.3g} s") from None
        except OSError as error:
            raise PeerGoneError(f"connection lost while sending: {explain(error)}") from None


def _left_s(deadline: Deadline) -> float:
    """Raises TimeoutError: a timeout of 0 would mean that the socket does not wait."""
    left_s = deadline.remaining_s()
    if left_s <= 0:
        raise TimeoutError
    return left_s
