"""The bootstrap directories that a decode rank asks, and their answers."""

from __future__ import annotations

import logging
import threading

import zmq

from sglang_prfaas.clock import Clock, Deadline
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import LocalError, ProtocolError
from sglang_prfaas.transport.addresses import endpoint
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.messages import Directory, Lookup, decode_from_directory, encode
from sglang_prfaas.transport.resolver import resolve_in_background
from sglang_prfaas.transport.security import ServerKey, ServerKeys
from sglang_prfaas.transport.security.curve import Loss

logger = logging.getLogger(__name__)

RETRY_S = 0.1
"""Least time between two questions to one directory."""
REFUSED_RETRY_S = 2.0
"""Time between two questions to a directory that has refused this rank, or cannot prove its site."""


class DirectoryClient:
    """Asks directories on the sockets of `loop`, and keeps complete answers until `forget`."""

    def __init__(self, loop: ZmqLoop, clock: Clock, timeout_s: float, keys: ServerKeys) -> None:
        self._loop = loop
        self._keys = keys
        self._clock = clock
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._found: dict[str, Directory] = {}
        self._asked: dict[str, Deadline] = {}
        self._problems: dict[str, str] = {}
        self._sockets: dict[str, zmq.Socket[bytes]] = {}

    def get(self, host: str, port: int) -> Directory | None:
        """The ranks behind a bootstrap address, or None while they are asked for. From any thread; never waits."""
        address = authority(host, port)
        with self._lock:
            found = self._found.get(address)
            if found is not None or address in self._asked:
                return found
            self._asked[address] = Deadline(self._clock, self._timeout_s)
        resolve_in_background(
            host,
            found=lambda numeric: self._loop.call(lambda: self._ask(address, numeric, port)),
            failed=lambda reason: self._failed(address, reason),
        )
        return None

    def problem(self, host: str, port: int) -> str:
        """Why there will be no answer for now, or an empty string. From any thread."""
        with self._lock:
            return self._problems.get(authority(host, port), "")

    def forget(self, address: str) -> None:
        """Ask again the next time."""
        with self._lock:
            self._found.pop(address, None)

    def tick(self) -> None:
        """Give up what was not answered in time. From within the loop."""
        with self._lock:
            late = [address for address, deadline in self._asked.items() if deadline.expired]
            for address in late:
                del self._asked[address]
                self._problems.pop(address, None)
        for address in late:
            self._drop(address)

    def _ask(self, address: str, host: str, port: int) -> None:
        self._drop(address)
        try:
            key = self._keys.get(address)
        except LocalError as error:
            self._failed(address, str(error))
            return
        sock = self._loop.socket(zmq.DEALER, host, key)
        self._loop.add(sock, lambda frames: self._answered(address, frames))
        self._loop.on_loss(sock, lambda loss: self._lost(address, key, loss), key)
        self._sockets[address] = sock
        try:
            sock.connect(endpoint(host, port))
            sock.send(encode(Lookup()), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self._drop(address)
            self._failed(address, f"cannot be asked: {error}")

    def _lost(self, address: str, key: ServerKey, loss: Loss) -> None:
        """The connection has ended before an answer came: ask again, with the next key where this one was refused."""
        self._drop(address)
        if loss.refused and self._keys.refused(address, key):
            self._failed(address, loss.reason)
            return
        with self._lock:
            self._asked[address] = Deadline(self._clock, RETRY_S)

    def _failed(self, address: str, reason: str) -> None:
        logger.warning("prfaas: bootstrap directory %s: %s", address, reason)
        with self._lock:
            self._problems[address] = f"bootstrap directory {address}: {reason}"
            self._asked[address] = Deadline(self._clock, REFUSED_RETRY_S)

    def _drop(self, address: str) -> None:
        sock = self._sockets.pop(address, None)
        if sock is not None:
            self._loop.remove(sock)

    def _answered(self, address: str, frames: list[zmq.Frame]) -> None:
        self._drop(address)
        self._keys.accepted(address)
        try:
            message = decode_from_directory(frames[-1].bytes)
        except ProtocolError as error:
            logger.warning("prfaas: bootstrap directory %s: %s", address, error)
            message = None
        with self._lock:
            if isinstance(message, Directory) and message.complete:
                self._found[address] = message
                self._asked.pop(address, None)
            else:
                self._asked[address] = Deadline(self._clock, RETRY_S)
