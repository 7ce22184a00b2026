"""The data connections of a decode rank: a thread each, which dials, checks what comes, and puts it in its place."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable

import numpy as np

from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import PeerGoneError, PrfaasError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.framing import HEADER_BYTES, RENEWAL, ChunkHeader, Preface, unpack_header, verify
from sglang_prfaas.transport.memory import Bytes
from sglang_prfaas.transport.messages import Welcome
from sglang_prfaas.transport.receive_session import PeerSession
from sglang_prfaas.transport.security import Security
from sglang_prfaas.transport.session import IncomingTransfer

logger = logging.getLogger(__name__)


class DataReceiver:
    """Receives the chunks of sessions over their data connections.

    Called from its threads: `lose` with a session that cannot go on and why, `complete` with a transfer whose last byte
    is in place."""

    def __init__(
        self,
        config: TransportConfig,
        security: Security,
        *,
        lose: Callable[[PeerSession, str], None],
        complete: Callable[[PeerSession, IncomingTransfer], None],
    ) -> None:
        self._config = config
        self._security = security
        self._lose = lose
        self._complete = complete
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def dial(self, session: PeerSession, host: str, welcome: Welcome) -> None:
        """Open all data connections of a session. Never waits."""
        connected = itertools.count(1)
        for index in range(self._config.connections):
            thread = threading.Thread(
                target=self._run,
                args=(session, host, welcome, index, connected),
                name="prfaas-receive-data",
                daemon=True,
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

    def _run(
        self, session: PeerSession, host: str, welcome: Welcome, index: int, connected: itertools.count[int]
    ) -> None:
        """One data connection, dialled again whenever prefill wants it made anew."""
        while self._receive(session, host, welcome, index, connected):
            pass

    def _receive(
        self, session: PeerSession, host: str, welcome: Welcome, index: int, connected: itertools.count[int]
    ) -> bool:
        """Dial, then place every chunk that comes. Returns whether the connection is to be dialled again."""
        connection: Connection | None = None
        try:
            connection = data_tcp.unconnected(host, self._config)
            with session.lock:
                if session.failure:
                    return False
                session.connections.append(connection)
            site = session.server.site
            data_tcp.connect(connection, host, welcome.data_port, self._config, self._security, site)
            data_tcp.send_all(connection.sock, Preface(index, welcome.token).pack())
            with session.lock:
                if next(connected) == self._config.connections and not session.failure:
                    session.up = True
            self._receive_chunks(session, connection)
            with session.lock:
                session.connections.remove(connection)
            return True
        except PrfaasError as error:
            self._lose(session, str(error))
        except Exception as error:
            logger.exception("prfaas: receiving from %s failed", session)
            self._lose(session, f"a chunk could not be placed: {error}")
        finally:
            if connection is not None:
                connection.close()
        return False

    def _receive_chunks(self, session: PeerSession, connection: Connection) -> None:
        """Place chunks until prefill wants the connection made anew. Raises PrfaasError when it ends otherwise."""
        sock = connection.sock
        head = memoryview(bytearray(HEADER_BYTES))
        staging = np.empty(self._config.chunk_bytes, dtype=np.uint8)
        while data_tcp.receive_exactly(sock, head):
            if head == RENEWAL:
                return
            header = unpack_header(head, self._config.chunk_bytes)
            payload = staging[: header.length]
            if not data_tcp.receive_exactly(sock, payload.data):
                raise PeerGoneError("data connection closed after a chunk's header")
            verify(head, header, payload.data)
            self._place(session, header, payload)
        raise PeerGoneError("the prefill server closed a data connection")

    def _place(self, session: PeerSession, header: ChunkHeader, payload: Bytes) -> None:
        item = session.incoming.get(header.transfer_id)
        if item is None:
            return  # a late chunk of a request that has ended: dropped, its pages may belong to another by now
        transfer = item.transfer
        with transfer.lock:
            if not transfer.live:
                return
            transfer.check(header)
            session.view.memory.components[header.component][header.buffer].scatter(
                item.indices[header.component], 0, header.offset, payload
            )
            complete = transfer.received(header)
        if complete:
            self._complete(session, transfer)
