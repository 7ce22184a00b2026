"""The data connections of a prefill rank: a thread each, which takes chunks and sends them, straight from the pages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError, PeerClosedError, PeerError, PrfaasError, ProtocolError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.acceptor import Acceptor
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.framing import RENEWAL, Receipt
from sglang_prfaas.transport.health import NOTICED_AT
from sglang_prfaas.transport.outbox import MAX_ATTEMPTS, Task, at_hand
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.pacing import Pacer, paced_chunk_bytes
from sglang_prfaas.transport.send_lane import SendLane
from sglang_prfaas.transport.send_session import DataLink, SendSession

logger = logging.getLogger(__name__)

PATIENCE_S = 0.002
"""So long who waits for a receipt reads by itself; then it leaves that to the acceptor's thread."""
SPIN_S = 50e-6
"""So long it looks again and again before it sleeps: to be woken takes about half of that."""
LONG_S = 0.002
"""On one host, a connection that has waited so long for its socket lets another go on as well; else it does at once."""
SMALL_BYTES = 64 << 10
"""Up to so many are sent from the thread that hands them over: waking another takes longer than sending them."""


class DataSender:
    """Sends the chunks of sessions over their data connections.

    `lock` guards the sessions' `links` and `health`. Called from its threads: `abort` with a transfer that cannot go on
    and why, `lose` with a session that cannot go on and why."""

    def __init__(
        self,
        config: TransportConfig,
        clock: Clock,
        lock: threading.Lock,
        *,
        lose: Callable[[SendSession, str], None],
        abort: Callable[[OutgoingTransfer, str], None],
        acceptor: Acceptor,
    ) -> None:
        self._config = config
        self._clock = clock
        self._lock = lock
        self._lose = lose
        self._abort = abort
        self._acceptor = acceptor
        self._threads: list[threading.Thread] = []
        self._pacer = Pacer(clock, config.rate_limit_mbps * 1e6 / 8)

    def add(self, session: SendSession, index: int, connection: Connection) -> Callable[[], bool]:
        """Give a connection to a session, and a thread; one with the same index is given up for it. Returns what to
        call when decode speaks on it or closes it, which returns whether it goes on. Under the lock.

        Raises ProtocolError for an index that is not to be had, LocalError where there is no thread."""
        if index >= session.hello.connections:
            raise ProtocolError(f"{session} did not announce a data connection with index {index}")
        chunk_bytes = paced_chunk_bytes(self._config.chunk_bytes, self._config.rate_limit_mbps)
        chunk_bytes = min(chunk_bytes, session.hello.chunk_bytes)
        sending = SendLane(session.view.memory, chunk_bytes, self._abort, session.codec)
        link = DataLink(index, connection, sending, self._clock.now_s())
        link.read_until = partial(self._read_until, session, link)
        link.read_held = partial(self._read_held, session, link)
        thread = threading.Thread(target=self._run, args=(session, link), name="prfaas-send-data", daemon=True)
        before = session.links.get(index)
        session.links[index] = link
        try:
            thread.start()
        except RuntimeError as error:
            del session.links[index]
            raise LocalError(f"no thread for a data connection of {session}: {error}") from None
        if before is not None:
            session.dispatch.lose(before)
            before.connection.cut()
        session.health.connected(index, self._clock.now_s())
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        return lambda: self._readable(session, link)

    def join(self, timeout_s: float) -> None:
        """Wait for the threads of sessions that were lost."""
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            thread.join(timeout_s)

    def give_up(self, session: SendSession, link: DataLink, reason: str, *, closed: bool = False) -> None:
        """A connection is lost: what it has not delivered goes over the others. closed: the peer closed it. Idempotent;
        from any thread."""
        resent = session.dispatch.lose(link)
        link.connection.cut()
        with self._lock:
            if session.links.get(link.index) is not link:
                return
            del session.links[link.index]
            session.health.disconnected(link.index, self._clock.now_s(), closed=closed)
            quiet = session.closed or link.renewing
        if not quiet:
            logger.warning(
                "prfaas: data connection %d of %s lost: %s; %d chunks go again", link.index, session, reason, resent
            )

    def stalled(self, session: SendSession) -> list[int]:
        """Give up the connections that have not moved for the heartbeat timeout though they should; returns which."""
        now_s = self._clock.now_s()
        with self._lock:
            links = list(session.links.values())
        found = []
        for link in links:
            connection = link.connection
            if not link.lane.flying:
                link.moved_s = now_s
                continue
            moved = (link.lane.first, connection.sent_bytes, connection.unsent_bytes())
            if moved != link.moved:
                link.moved, link.moved_s = moved, now_s
            elif now_s - link.moved_s > NOTICED_AT * self._config.heartbeat_timeout_s:
                self.give_up(session, link, f"no progress for {now_s - link.moved_s:.1f} s")
                found.append(link.index)
        return found

    def renew_all(self, session: SendSession, reason: str) -> None:
        """Give up all connections of a session; decode dials them again."""
        with self._lock:
            links = list(session.links.values())
        for link in links:
            self.give_up(session, link, reason)

    # --- receipts, in the acceptor's thread -----------------------------------------------------------------------

    def _readable(self, session: SendSession, link: DataLink) -> bool:
        try:
            with link.reading:
                self._read_receipts(session, link)
        except ProtocolError as error:
            self._lose(session, str(error))
            return False
        except PeerError as error:
            self.give_up(session, link, str(error), closed=isinstance(error, PeerClosedError))
            if link.renewing:
                self._acceptor.discard(link.connection)
            return False
        session.health.heard(self._clock.now_s())
        return True

    def _read_until(self, session: SendSession, link: DataLink, came: Callable[[], bool]) -> None:
        """Read receipts on the calling thread, which waits for one that should come at once: no other has to wake."""
        if not came() and self._hold(link):
            self._read_held(session, link, came)

    def _hold(self, link: DataLink) -> bool:
        """Leave a connection's receipts to the calling thread, which must call `_read_held` next; returns False, and
        does nothing, where another has them, or it has ended."""
        if not link.reader.acquire(blocking=False):
            return False
        if not self._acceptor.look_away(link.connection):
            link.reader.release()
            return False
        return True

    def _read_held(self, session: SendSession, link: DataLink, came: Callable[[], bool]) -> None:
        connection = link.connection
        try:
            began_s = now_s = self._clock.now_s()
            while not came() and now_s < began_s + PATIENCE_S:
                sleep_s = began_s + PATIENCE_S - now_s if now_s >= began_s + SPIN_S else 0.0
                if connection.wait(write=False, timeout_s=sleep_s) and not self._readable(session, link):
                    break
                now_s = self._clock.now_s()
            self._acceptor.look_again(connection)
        finally:
            link.reader.release()

    def _read_receipts(self, session: SendSession, link: DataLink) -> None:
        buffer = link.read_buffer
        while (count := link.connection.receive([buffer])) is not None:
            if count == 0:
                raise PeerClosedError("decode closed it")
            for receipt in link.receipts.feed(bytes(buffer[:count])):
                self._receipt(session, link, receipt)
            if count < len(buffer) and not link.connection.tls:
                return

    def _receipt(self, session: SendSession, link: DataLink, receipt: Receipt) -> None:
        number = receipt.number
        if link.lane.lost:
            return
        if not receipt.again:
            for task in session.dispatch.acknowledged(link, number):
                with task.transfer.lock:
                    task.transfer.acknowledged(task.span.length)
            return
        corrupt = session.dispatch.again(link, number)
        if corrupt is None:
            return
        with corrupt.transfer.lock:
            corrupt.transfer.corrupt_chunks += 1
        if corrupt.attempts >= MAX_ATTEMPTS:
            self._abort(corrupt.transfer, f"a chunk arrived corrupt {corrupt.attempts} times")

    # --- sending, a thread for each connection --------------------------------------------------------------------

    def _run(self, session: SendSession, link: DataLink) -> None:
        connection = link.connection
        try:
            data_tcp.tune(connection.sock, session.config)
            same_host = connection.same_host
            link.sending.native = not connection.tls
            session.dispatch.sparing = same_host
            while tasks := self._batch(session, link):
                delay_s = self._pacer.reserve(link.sending.batch_bytes)
                if delay_s:
                    time.sleep(delay_s)
                while not _push(connection, link.sending):
                    if not (same_host and connection.wait(write=True, timeout_s=LONG_S)):
                        session.dispatch.share(link)
                        connection.wait(write=True)
                _note_sent(tasks)
                if connection.used_up:
                    self._renew(link)
                    return  # decode closes it, once it has read and acknowledged all of it
        except PeerError as error:
            self.give_up(session, link, str(error), closed=isinstance(error, PeerClosedError))
        except PrfaasError as error:
            self._lose(session, str(error))
        except Exception as error:
            logger.exception("prfaas: sending to %s failed", session)
            self._lose(session, f"a chunk could not be sent: {error}")
        self._acceptor.discard(connection)

    def send_at_once(self, session: SendSession, tasks: list[Task], *, awaited: bool = False) -> bool:
        """Send a few small chunks of one transfer from the calling thread, where a connection is idle: none has to wake
        for them. Waits for nothing. Returns False, and does nothing, where they have to wait their turn. awaited: the
        caller waits for their receipts next."""
        link = None if self._pacer.limits else session.dispatch.borrow(tasks)
        if link is None:
            return False
        held = awaited and self._hold(link)
        tasks[0].transfer.read_receipts = link.read_held if held else link.read_until
        begun = tasks
        try:
            begun = self._fill(session, link, tasks)
            if _push(link.connection, link.sending):
                _note_sent(begun)
                begun = []
        except PeerError as error:
            link.failure = error
        finally:
            session.dispatch.give_back(link, begun)
        return True

    @staticmethod
    def _fill(session: SendSession, link: DataLink, tasks: list[Task]) -> list[Task]:
        """Make a batch of chunks that were borrowed for; returns those that are in it."""
        link.sending.reset()
        for at, task in enumerate(tasks):
            if not link.sending.add(task, copy=True):
                session.dispatch.untake(link, len(tasks) - at)
                return tasks[:at]
        return tasks

    @staticmethod
    def _batch(session: SendSession, link: DataLink) -> list[Task]:
        """Make the next batch, waiting for its first chunk, or go on with one that was begun. Empty once the connection
        is lost. Raises PeerError where a borrower has met one."""
        dispatch, lane = session.dispatch, link.sending
        lane.reset()
        tasks: list[Task] = []
        while not lane.full:
            task = dispatch.take(link, wait=not tasks)
            if task is None:
                break
            if task.ready is not at_hand:
                dispatch.share(link)  # it may wait for a device
            if lane.add(task):
                tasks.append(task)
            else:
                dispatch.untake(link)
        if link.failure is not None:
            raise link.failure
        begun, link.begun = link.begun, []
        return begun or tasks

    def _renew(self, link: DataLink) -> None:
        """The connection's keys are used up: have decode dial it again."""
        with self._lock:
            link.renewing = True
        rest = [memoryview(RENEWAL)]
        while rest or not link.connection.flush():
            sent = link.connection.send(rest) if rest else 0
            rest = [rest[0][sent:]] if rest and sent < len(rest[0]) else []
            if rest or not link.connection.flush():
                link.connection.wait(write=True)


def _push(connection: Connection, lane: SendLane) -> bool:
    """Send what the socket takes of a batch. Returns whether all of it has left. Raises PeerGoneError."""
    return lane.push(connection) and connection.flush()


def _note_sent(tasks: list[Task]) -> None:
    """A batch has left."""
    for task in tasks:
        with task.transfer.lock:
            task.transfer.sent(task.span.length, task.wire_bytes, again=task.attempts > 1)
