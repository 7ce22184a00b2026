"""Keeps the clients of a bound ZeroMQ socket within their bounds: between `clients`, which decides, and the socket."""

from __future__ import annotations

import logging
from collections.abc import Callable

import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.transport.clients import Clients, Doomed
from sglang_prfaas.transport.security import Security, curve
from sglang_prfaas.transport.security.peers import Watch
from sglang_prfaas.transport.security.refusals import RefusalLog

Handler = Callable[[list[zmq.Frame]], None]
Told = Callable[[Doomed], bool]


class ClientGate:
    """Of one socket. Belongs to the loop that owns it. messages_per_s: of one client, see `clients`."""

    def __init__(self, clock: Clock, security: Security, refusals: RefusalLog, messages_per_s: float) -> None:
        self._clock = clock
        self._with_keys = security.keys is not None
        self._refusals = refusals
        self._clients = Clients(messages_per_s)
        self._handshakes: list[tuple[str, int]] = []
        """Why the connection whose end is told of next failed in its handshake."""
        self.told: Told = lambda doomed: False
        """Called with a client that will be cut, which may be told a last word; returns whether that was logged."""
        self.lost: Callable[[int], None] = lambda descriptor: None
        """Called with the descriptor of a connection that has ended."""
        self.connected: set[int] = set()
        """The descriptors of those that stand."""

    def seen(self, event: int, value: int) -> None:
        """What the socket's monitor tells."""
        if event == zmq.EVENT_ACCEPTED:
            self._doom(self._clients.accepted(value, curve.peer_address(value), self._clock.now_s()))
            self.connected.add(value)
        elif event == zmq.EVENT_DISCONNECTED:
            if self._handshakes:
                reason, level = self._handshakes.pop()
                self._refusals.warn(f"control connection from {self._clients.host(value)} refused: {reason}", level)
            self._clients.gone(value)
            self.connected.discard(value)
            self.lost(value)
        else:
            reason = curve.refused_client(event, value, keys=self._with_keys)
            level = logging.INFO if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL else logging.WARNING
            self._handshakes = [(reason, level)] if reason else []

    def guard(self, handler: Handler) -> Handler:
        """`handler`, for messages that count."""

        def heard(frames: list[zmq.Frame]) -> None:
            verdict = self._clients.heard(
                int(frames[0].get("__fd")),
                frames[0].bytes,
                sum(map(len, frames)),
                self._clock.now_s(),
                lambda: self._proof(frames[0]),
            )
            if verdict is True:
                handler(frames)
            elif verdict is not False:
                self._doom(verdict)

        return heard

    def tick(self) -> None:
        """Cut those that are due."""
        silent, due = self._clients.tick(self._clock.now_s())
        for doomed in silent:
            self._doom(doomed)
        for descriptor in due:
            self._cut(descriptor)

    def list_changed(self, watch: Watch) -> None:
        """Doom those that are not let in any more."""
        for doomed in self._clients.unlisted(watch.has_key, self._clock.now_s()):
            self._doom(doomed)

    def _proof(self, frame: zmq.Frame) -> tuple[str, str]:
        return (str(frame.get("User-Id")), str(frame.get(curve.KEY_PROPERTY))) if self._with_keys else ("", "")

    def _doom(self, doomed: Doomed | None) -> None:
        if doomed is None:
            return
        if not doomed.identity or not self.told(doomed):
            self._refusals.warn(f"control connection from {doomed.who} ended: {doomed.reason}")
        if not doomed.identity:
            self._cut(doomed.descriptor)

    def _cut(self, descriptor: int) -> None:
        curve.cut(descriptor, self._clients.address(descriptor))
        self._clients.gone(descriptor)
