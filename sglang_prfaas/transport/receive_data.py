"""The data connections of a decode rank: a thread each, which dials, receives into the pages, and dials again."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import ChecksumError, PeerGoneError, PortRefusedError, PrfaasError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.framing import Preface
from sglang_prfaas.transport.health import Contact, backoff_s
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.messages import Welcome
from sglang_prfaas.transport.receive_lane import ReceiveLane
from sglang_prfaas.transport.receive_session import PeerSession
from sglang_prfaas.transport.security import Security

logger = logging.getLogger(__name__)

AHEAD_BYTES = 32 << 10
"""Of what comes first after a pause: received at one go, header and all, and copied."""
REDIAL_TIMEOUT_S = 3.0
"""For one attempt to dial a lost connection again."""
SPIN_S = 50e-6
"""So long a thread looks again and again before it sleeps, where little came the last time, and soon: to be woken takes
about as long as a small chunk."""
SOON_S = 100e-6
"""Soon."""
LOW_WATER_BYTES = 256 << 10
"""A thread sleeps until so many bytes have come, or all that its chunk lacks."""


class DataReceiver:
    """Receives the chunks of sessions over their data connections.

    Called from its threads: `lose` with a session that cannot go on and why, `complete` with a transfer whose last byte
    is in place."""

    def __init__(
        self,
        config: TransportConfig,
        security: Security,
        clock: Clock,
        *,
        lose: Callable[[PeerSession, str], None],
        complete: Callable[[PeerSession, IncomingTransfer], None],
    ) -> None:
        self._config = config
        self._security = security
        self._clock = clock
        self._lose = lose
        self._complete = complete
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def dial(self, session: PeerSession, host: str, welcome: Welcome) -> None:
        """Open all data connections of a session. Never waits."""
        for index in range(session.config.connections):
            thread = threading.Thread(
                target=self._run, args=(session, host, welcome, index), name="prfaas-receive-data", daemon=True
            )
            with self._lock:
                self._threads = [t for t in self._threads if t.is_alive()] + [thread]
                thread.start()

    def join(self, timeout_s: float) -> None:
        """Wait for the threads of sessions that were lost."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(timeout_s)

    def _run(self, session: PeerSession, host: str, welcome: Welcome, index: int) -> None:
        """One data connection, dialled again until its session ends."""
        rng = random.Random(index)
        attempt = 0
        try:
            while not session.ended.wait(backoff_s(attempt, rng)):
                attempt += 1
                began_s = self._clock.now_s()
                try:
                    if self._connection(session, host, welcome, index):
                        attempt = 0
                except (PeerGoneError, ChecksumError) as error:
                    if not self._may_redial(session, index, error):
                        raise
                    # One that stood for a while, rather than being refused at once, is worth another try at once.
                    if self._clock.now_s() - began_s > REDIAL_TIMEOUT_S:
                        attempt = 0
        except PrfaasError as error:
            self._lose(session, str(error))
        except Exception as error:
            logger.exception("prfaas: receiving from %s failed", session)
            self._lose(session, f"a chunk could not be placed: {error}")

    def _may_redial(self, session: PeerSession, index: int, error: PrfaasError) -> bool:
        """Note that a connection is lost; returns whether its session lives on."""
        with session.lock:
            if session.health.contact is Contact.OPENING:
                return False
            if isinstance(error, PortRefusedError):
                session.health.refused(index)
            else:
                logger.info("prfaas: data connection %d of %s: %s", index, session, error)
            why = session.health.verdict(self._clock.now_s())
        if why:
            self._lose(session, why)
        return True

    def _connection(self, session: PeerSession, host: str, welcome: Welcome, index: int) -> bool:
        """Dial, then place every chunk that comes. Returns whether prefill asked for the connection to be made anew,
        False where the session has ended; raises PrfaasError for any other end."""
        connection = data_tcp.unconnected(host, session.config)
        try:
            with session.lock:
                if session.failure:
                    return False
                session.connections[index] = connection
                opening = session.health.contact is Contact.OPENING
            timeout_s = self._config.handshake_timeout_s
            if not opening:
                timeout_s = min(timeout_s, REDIAL_TIMEOUT_S)
            site = session.server.site
            data_tcp.connect(connection, host, welcome.data_port, timeout_s, self._security, site)
            connection.sock.sendall(Preface(index, welcome.token).pack())
            connection.unblock(receiving=True)
            with session.lock:
                session.health.connected(index, self._clock.now_s(), heard=False)
                session.up = session.up or (session.health.contact is Contact.UP and not session.failure)
            self._receive(session, connection)
            return True
        except OSError as error:
            raise PeerGoneError(f"data connection lost before its preface: {error}") from None
        finally:
            with session.lock:
                session.connections.pop(index, None)
                session.health.disconnected(index, self._clock.now_s())
            connection.close()

    def _receive(self, session: PeerSession, connection: Connection) -> None:
        """Place chunks until prefill wants the connection made anew. Raises PrfaasError when it ends otherwise."""
        lane = ReceiveLane(
            session.view.memory,
            self._config.chunk_bytes,
            session.incoming.get,
            lambda transfer: self._complete(session, transfer),
            session.codec,
            native=not connection.tls,
        )
        ahead = memoryview(bytearray(AHEAD_BYTES))
        unsent = b""
        may_wait = soon = False
        try:
            while True:
                if may_wait:
                    began_s = self._clock.now_s()
                    count = self._awaited(connection, ahead, began_s + (SPIN_S if soon else 0.0))
                    short = count is None or count < len(ahead)
                    soon = short and self._clock.now_s() < began_s + SOON_S
                    if count:
                        lane.take(ahead[:count])
                else:
                    count, short, soon = lane.fill(connection), lane.short, False
                if count == 0:
                    end = "closed" if lane.between_chunks else "closed in the middle of a chunk"
                    raise PeerGoneError(f"data connection {end}")
                if count is not None:
                    session.health.heard(self._clock.now_s())
                unsent += lane.answers(idle=short or lane.renewed)
                if unsent:
                    unsent = unsent[connection.send([memoryview(unsent)]) :]
                    connection.flush()
                if lane.renewed:
                    return
                may_wait = False
                if count is None or (short and not connection.tls):
                    connection.want(min(lane.wanted_bytes, LOW_WATER_BYTES))
                    may_wait = lane.between_chunks and not connection.tls  # nothing is pinned then
                    if not may_wait:
                        connection.wait(write=False)
        finally:
            lane.lost()

    def _awaited(self, connection: Connection, ahead: memoryview, spin_until_s: float) -> int | None:
        """What comes next, and may take any time."""
        while self._clock.now_s() < spin_until_s:
            if connection.wait(write=False, timeout_s=0.0):
                return connection.receive([ahead])
        return connection.receive([ahead], wait=True)
