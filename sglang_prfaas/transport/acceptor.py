"""One thread that accepts data connections, reads their prefaces, and watches for what peers say on them later."""

from __future__ import annotations

import logging
import os
import select
import selectors
import socket
import ssl
import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from sglang_prfaas.clock import Clock
from sglang_prfaas.errors import PrfaasError, ProtocolError
from sglang_prfaas.transport.clients import source_of
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.framing import PREFACE, Preface, unpack_preface
from sglang_prfaas.transport.security import PLAIN, Security
from sglang_prfaas.transport.security.refusals import RefusalLog
from sglang_prfaas.transport.security.tls import explain

logger = logging.getLogger(__name__)

MAX_PENDING_CONNECTIONS = 256
"""Data connections whose preface has not come yet; one more, and the oldest is closed of the source that has most."""
MAX_SOURCE_PENDING = 128
"""Of one source (`clients.source_of`)."""
ACCEPT_PAUSE_S = 1.0
"""Rest after an accept that failed, for want of descriptors."""
MAX_DRAINED_BYTES = 1 << 16
"""Read at one go of what a refused peer still sends; more than that, and it is cut off."""


class Owner(Protocol):
    """Whom an accepted connection belongs to."""

    def admit(self, preface: Preface, connection: Connection) -> Callable[[], bool]:
        """Take the connection in, or raise PrfaasError. Returns what to call when the peer closes it or speaks; that
        returns whether to go on calling it. It must not wait for the peer."""


class _Pending:
    """A connection that has yet to shake hands (with TLS), or to send its preface."""

    def __init__(self, address: str, since_s: float) -> None:
        self.address = address
        self.source = source_of(address)
        self.since_s = since_s
        self.shaken = False
        self.refused = False
        self.data = bytearray()


class Acceptor:
    """Owns `listener` and the descriptors of all accepted connections until they are given to `discard`."""

    def __init__(
        self,
        listener: socket.socket,
        clock: Clock,
        preface_timeout_s: float,
        owner: Owner,
        security: Security = PLAIN,
    ) -> None:
        self._listener = listener
        self._clock = clock
        self._preface_timeout_s = preface_timeout_s
        self._owner = owner
        self._security = security
        self._refusals = RefusalLog(logger, clock)
        self._selector = selectors.EpollSelector()
        self._epoll = select.epoll.fromfd(os.dup(self._selector.fileno()))
        """The same, for any thread."""
        self._pending: dict[Connection, _Pending] = {}
        self._admitted: dict[Connection, Callable[[], bool]] = {}
        self._discarded: deque[Connection] = deque()
        self._paused_until_s = 0.0
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_write.setblocking(False)
        self._stopping = threading.Event()
        self._ended = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="prfaas-send-accept", daemon=True)
        listener.setblocking(False)

    def start(self) -> None:
        self._thread.start()

    def discard(self, connection: Connection) -> None:
        """Close a connection that its thread has finished with. From any thread."""
        with self._lock:
            if self._ended:
                connection.close()
                return
            self._discarded.append(connection)
            self._wake()

    def look_away(self, connection: Connection) -> bool:
        """Do not watch an admitted connection for a while: the caller reads it. From any thread; returns False where it
        is not watched. `look_again` must follow."""
        return connection.unless_closed(lambda descriptor: self._watch(descriptor, 0))

    def look_again(self, connection: Connection) -> None:
        """Watch a connection as before."""
        connection.unless_closed(lambda descriptor: self._watch(descriptor, select.EPOLLIN))

    def _watch(self, descriptor: int, events: int) -> bool:
        try:
            self._epoll.modify(descriptor, events)
        except FileNotFoundError:
            return False  # its peer has ended it
        return True

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stop accepting and close everything. Idempotent; works on one that was never started."""
        self._stopping.set()
        with self._lock:
            if not self._ended:
                self._wake()
        if self._thread.ident is None:
            self._end()
        else:
            self._thread.join(timeout_s)

    def _wake(self) -> None:
        try:
            self._wake_write.send(b"\0")
        except BlockingIOError:
            pass  # full of wake-ups already

    def _run(self) -> None:
        try:
            self._selector.register(self._wake_read, selectors.EVENT_READ)
            self._selector.register(self._listener, selectors.EVENT_READ)
            while not self._stopping.is_set():
                self._step()
        finally:
            self._end()

    def _end(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        for connection in [*self._pending, *self._admitted, *self._discarded]:
            connection.close()
        self._epoll.close()
        self._selector.close()
        self._listener.close()
        self._wake_read.close()
        self._wake_write.close()

    def _step(self) -> None:
        for key, _ in self._selector.select(timeout=1.0):
            if key.fileobj is self._wake_read:
                self._wake_read.recv(4096)
            elif key.fileobj is self._listener:
                self._accept()
            elif isinstance(key.data, Connection):
                self._readable(key.data)
        while self._discarded:
            connection = self._discarded.popleft()
            self._unwatch(connection)
            self._admitted.pop(connection, None)
            connection.close()
        now_s = self._clock.now_s()
        for connection, pending in list(self._pending.items()):
            if now_s - pending.since_s > self._preface_timeout_s:
                self._refuse(connection, f"no preface within {self._preface_timeout_s:g} s")
                self._drop(connection)
        if self._paused_until_s and now_s >= self._paused_until_s:
            self._paused_until_s = 0.0
            self._selector.register(self._listener, selectors.EVENT_READ)

    def _readable(self, connection: Connection) -> None:
        speaks = self._admitted.get(connection)
        pending = self._pending.get(connection)
        if speaks is not None:
            if not speaks():
                self._unwatch(connection)
        elif pending is not None:  # else it was dropped to make room, in this very turn
            if pending.refused:
                self._drain(connection)
            else:
                self._read_preface(connection, pending)

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except BlockingIOError:
            return  # it gave up before it was accepted
        except OSError as error:
            logger.warning("prfaas: a data connection could not be accepted: %s", error)
            self._selector.unregister(self._listener)
            self._paused_until_s = self._clock.now_s() + ACCEPT_PAUSE_S
            return
        self._make_room(source_of(address[0]))
        sock.setblocking(False)
        try:
            sock = self._security.wrap(sock, server_side=True)
        except OSError as error:
            sock.close()
            self._refusals.warn(f"data connection from {address[0]} refused: {explain(error)}")
            return
        connection = Connection(sock)
        self._pending[connection] = _Pending(address[0], self._clock.now_s())
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _make_room(self, source: str) -> None:
        """For one more connection of a source that has no preface yet."""
        sources = Counter(pending.source for pending in self._pending.values())
        crowd, size = source, sources[source]
        if size < MAX_SOURCE_PENDING:
            if len(self._pending) < MAX_PENDING_CONNECTIONS:
                return
            crowd, size = sources.most_common(1)[0]
        oldest = next(connection for connection, pending in self._pending.items() if pending.source == crowd)
        self._refuse(oldest, f"no preface, and {size} of its address and {len(self._pending)} in all wait")
        self._drop(oldest)

    def _unwatch(self, connection: Connection) -> None:
        try:
            self._selector.unregister(connection.sock)
        except KeyError:
            pass  # it was unwatched when its peer closed it

    def _refuse(self, connection: Connection, reason: str) -> None:
        """Say so, here and to the peer. It is closed once the peer has closed: with bytes of the peer's unread, its end
        would be a reset, which can overtake a TLS alert that says why."""
        pending = self._pending[connection]
        if pending.refused:
            return
        pending.refused = True
        self._refusals.warn(f"data connection from {pending.address} refused: {reason}")
        try:
            connection.sock.setblocking(False)
            socket.socket.shutdown(connection.sock, socket.SHUT_WR)
        except OSError:
            self._drop(connection)
        else:
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)

    def _drain(self, connection: Connection) -> None:
        """Read, below TLS, what a refused peer still sends, until its end."""
        try:
            count = len(socket.socket.recv(connection.sock, MAX_DRAINED_BYTES))
        except BlockingIOError:
            return
        except OSError:
            count = 0
        if not 0 < count < MAX_DRAINED_BYTES:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        """Close a connection that was not let in. Idempotent."""
        if self._pending.pop(connection, None) is not None:
            self._unwatch(connection)
            connection.close()

    def _read_preface(self, connection: Connection, pending: _Pending) -> None:
        try:
            preface = self._preface(connection, pending)
            self._selector.modify(connection.sock, selectors.EVENT_READ, connection)
            if preface is None:
                return
            connection.unblock()
            speaks = self._owner.admit(preface, connection)
        except ssl.SSLWantWriteError:
            self._selector.modify(connection.sock, selectors.EVENT_WRITE, connection)
        except PrfaasError as error:
            self._refuse(connection, str(error))
        except OSError as error:
            self._refuse(connection, explain(error))
        else:
            del self._pending[connection]
            self._admitted[connection] = speaks

    def _preface(self, connection: Connection, pending: _Pending) -> Preface | None:
        """The preface once all of it is there. Raises PrfaasError for a peer that is not let in or sends another,
        OSError."""
        data = pending.data
        try:
            if not pending.shaken:
                connection.site, connection.certificate = self._security.handshake(connection.sock)
                pending.shaken = True
            while len(data) < PREFACE.size:
                more = connection.sock.recv(PREFACE.size - len(data))
                if not more:
                    raise ProtocolError("closed before its preface")
                data += more
        except (BlockingIOError, ssl.SSLWantReadError):
            return None
        return unpack_preface(bytes(data))
