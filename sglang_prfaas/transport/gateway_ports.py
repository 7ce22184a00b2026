"""The ports of a gateway, which accept connections, or refuse them for a moment.

Where nothing listens on a port in the other site, the gateway's refuses for a moment too, so that whoever dials again
learns that the process is gone, as it would without a gateway.
"""

from __future__ import annotations

import logging
import selectors
import socket
from collections import deque
from collections.abc import Callable

from sglang_prfaas.clock import Clock

logger = logging.getLogger(__name__)

REFUSE_S = 1.0
"""For how long a port refuses once nothing listened there."""

Accept = Callable[[socket.socket, str], None]
"""Called with a connection, and the address it comes from."""


class GatewayPorts:
    """Ports of `host`, watched by `selector`, with whom to call as the data of each key. Belongs to the thread that
    accepts, but for `refuse`."""

    def __init__(self, host: str, selector: selectors.BaseSelector, clock: Clock) -> None:
        self._family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._host = host
        self._selector = selector
        self._clock = clock
        self._listeners: dict[int, socket.socket] = {}
        self._accept: dict[int, Accept] = {}
        self._closed: deque[int] = deque()
        """Ports at which nothing listens, as the other site has said, and that do not refuse yet."""
        self._refusing: dict[int, float] = {}
        """Ports that refuse, and since when."""

    def listen(self, port: int, accept: Accept) -> None:
        """Have `accept` called with what comes. Raises OSError, OverflowError."""
        listener = socket.create_server((self._host, port), family=self._family)
        listener.setblocking(False)
        self._listeners[port] = listener
        self._accept[port] = accept
        self._selector.register(listener, selectors.EVENT_READ, accept)

    def refuse(self, port: int) -> None:
        """Nothing listens at this port there. From any thread; takes effect with `refuse_or_listen`."""
        self._closed.append(port)

    def refuse_or_listen(self) -> None:
        """Have ports refuse at which nothing listens there, and listen again on those that have for long enough."""
        now_s = self._clock.now_s()
        closed = {self._closed.popleft() for _ in range(len(self._closed))} - set(self._refusing)
        for port in closed:
            listener = self._listeners.pop(port)
            self._selector.unregister(listener)
            listener.close()
            self._hold(port)
            self._refusing[port] = now_s
        for port in [port for port, since_s in self._refusing.items() if now_s - since_s >= REFUSE_S]:
            self._refusing[port] = now_s
            if port in self._listeners or self._hold(port):
                del self._refusing[port]
                self._listeners[port].listen()
                self._selector.register(self._listeners[port], selectors.EVENT_READ, self._accept[port])

    def close(self) -> None:
        """Close all."""
        for sock in self._listeners.values():
            sock.close()

    def _hold(self, port: int) -> bool:
        """Keep a port that nobody listens on from others. Returns whether it could be had."""
        sock = socket.socket(self._family)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self._host, port))
        except OSError as error:
            sock.close()
            logger.warning("prfaas: gateway: port %d was taken meanwhile, and is tried again: %s", port, error)
            return False
        sock.setblocking(False)
        self._listeners[port] = sock
        return True
