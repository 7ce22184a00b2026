"""The data connections of a prefill rank: a thread each, which takes chunks, copies them out, and sends them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import numpy as np

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError, PeerError, PrfaasError, ProtocolError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.framing import HEADER_BYTES, RENEWAL, ChunkHeader, pack_header
from sglang_prfaas.transport.memory import Bytes, RankMemory
from sglang_prfaas.transport.pacing import Pacer
from sglang_prfaas.transport.send_session import SendSession, Task
from sglang_prfaas.transport.session import OutgoingTransfer

logger = logging.getLogger(__name__)


class DataSender:
    """Sends the chunks of sessions over their data connections.

    `lock` guards the sessions' `connections`. Called from its threads: `lose` with a session that cannot go on and why,
    `abort` with a transfer that cannot, `discard` with a connection that its thread has done with."""

    def __init__(
        self,
        config: TransportConfig,
        clock: Clock,
        lock: threading.Lock,
        *,
        lose: Callable[[SendSession, str], None],
        abort: Callable[[OutgoingTransfer, str], None],
        discard: Callable[[Connection], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._lock = lock
        self._lose = lose
        self._abort = abort
        self._discard = discard
        self._threads: list[threading.Thread] = []
        self._pacer = Pacer(clock, config.rate_limit_mbps * 1e6 / 8)

    def add(self, session: SendSession, index: int, connection: Connection) -> Callable[[], None]:
        """Give a connection to a session, and a thread. Returns what to call when decode closes it. Under the lock.

        Raises ProtocolError for an index that is not to be had, LocalError where there is no thread."""
        before = session.connections.get(index)
        if index >= session.hello.connections or (before is not None and not before.renewing):
            raise ProtocolError(f"{session} did not announce a data connection with index {index}")
        thread = threading.Thread(
            target=self._run, args=(session, index, connection), name="prfaas-send-data", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:
            raise LocalError(f"no thread for a data connection of {session}: {error}") from None
        session.connections[index] = connection
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        return lambda: self._closed(session, connection)

    def join(self, timeout_s: float) -> None:
        """Wait for the threads of sessions that were lost."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(timeout_s)

    def _closed(self, session: SendSession, connection: Connection) -> None:
        """Decode has closed a connection; one that is being made anew is not missed."""
        if not connection.renewing:
            self._lose(session, "it closed a data connection")

    def _run(self, session: SendSession, index: int, connection: Connection) -> None:
        try:
            data_tcp.tune(connection.sock, self._config)
            staging = np.empty(min(self._config.chunk_bytes, session.hello.chunk_bytes), dtype=np.uint8)
            while (task := session.tasks.take()) is not None:
                try:
                    self._send_chunk(task, session.view.memory, connection, staging)
                except PeerError:
                    raise
                except Exception as error:
                    logger.exception("prfaas: a chunk of room %d could not be read", task.transfer.room)
                    self._abort(task.transfer, f"prefill could not read a chunk: {error}")
                if connection.used_up:
                    self._renew(session, index, connection)
                    return
        except PrfaasError as error:
            self._lose(session, str(error))
        finally:
            self._discard(connection)

    def _renew(self, session: SendSession, index: int, connection: Connection) -> None:
        """The connection's keys are used up: have decode dial it again. Until then it belongs to the session, so that
        it is cut with it."""
        with self._lock:
            connection.renewing = True
            session.opened_s = self._clock.now_s()
        data_tcp.send_all(connection.sock, RENEWAL)
        with self._lock:
            if session.connections.get(index) is connection:
                del session.connections[index]

    def _send_chunk(self, task: Task, memory: RankMemory, connection: Connection, staging: Bytes) -> None:
        transfer, span = task.transfer, task.span
        expected = transfer.expected
        if expected is None:
            return
        task.ready()
        delay_s = self._pacer.reserve(HEADER_BYTES + span.length)
        if delay_s:
            time.sleep(delay_s)
        out = staging[: span.length]
        with transfer.lock:
            if not transfer.live:
                return
            buffer = memory.components[span.component][span.buffer]
            buffer.gather(task.indices, task.first_item, span.offset, out)
        header = ChunkHeader(expected.transfer_id, span.component, span.buffer, span.offset, span.length)
        data_tcp.send_all(connection.sock, pack_header(header, out.data), out.data)
        connection.count(HEADER_BYTES + span.length)
        with transfer.lock:
            transfer.sent(span.length)
