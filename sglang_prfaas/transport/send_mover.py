"""The mover of a prefill rank: sessions with decode ranks, and the chunks on their way to them."""

from __future__ import annotations

import logging
import secrets
import selectors
import socket
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError, PeerError, PrfaasError, ProtocolError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.framing import PREFACE, ChunkHeader, pack_header, unpack_preface
from sglang_prfaas.transport.layout import Layout, differences
from sglang_prfaas.transport.loop import ZmqLoop, endpoint
from sglang_prfaas.transport.memory import Indices, RankMemory
from sglang_prfaas.transport.messages import (
    PROTOCOL_VERSION,
    Abort,
    Done,
    Expect,
    Failed,
    Hello,
    Message,
    Ping,
    Pong,
    Refuse,
    Unknown,
    Welcome,
    decode_to_prefill,
    encode,
)
from sglang_prfaas.transport.session import OutgoingTransfer, State
from sglang_prfaas.transport.streams import ChunkSpan, cut

logger = logging.getLogger(__name__)

MAX_EARLY_ROOMS = 4096
"""Rooms remembered of which decode spoke before prefill's own request came."""
MAX_SESSIONS = 1024
MAX_PENDING_CONNECTIONS = 256


class _Task:
    """One chunk to send."""

    __slots__ = ("first_item", "indices", "ready", "span", "transfer")

    def __init__(
        self, transfer: OutgoingTransfer, span: ChunkSpan, indices: Indices, first_item: int, ready: Callable[[], None]
    ) -> None:
        self.transfer = transfer
        self.span = span
        self.indices = indices
        self.first_item = first_item
        self.ready = ready


class _Session:
    """One decode rank: its identity on the control socket, its data connections, and what waits to be sent."""

    def __init__(self, identity: bytes, hello: Hello, now_s: float) -> None:
        self.identity = identity
        self.hello = hello
        self.token = secrets.token_bytes(16)
        self.seen_s = now_s
        self.sockets: list[socket.socket] = []
        self.transfers: dict[int, OutgoingTransfer] = {}
        self.tasks: deque[_Task] = deque()
        self.condition = threading.Condition()
        self.closed = False

    def __str__(self) -> str:
        return f"decode {self.hello.site}/{self.hello.server}" if self.hello.site else f"decode {self.hello.server}"

    def put(self, tasks: list[_Task]) -> None:
        with self.condition:
            self.tasks.extend(tasks)
            self.condition.notify_all()

    def next_task(self) -> _Task | None:
        """The next chunk, waiting for one; None once the session is closed."""
        with self.condition:
            while not self.tasks and not self.closed:
                self.condition.wait()
            return None if self.closed else self.tasks.popleft()


class SendMover:
    """Sends items of `memory` to decode ranks that asked for them.

    Listens on two ports of `host`: control (ZeroMQ) and data (TCP); `first_port` and the one after it, or any free two
    for 0. Raises LocalError where they are taken. Methods may be called from any thread.
    """

    def __init__(
        self,
        layout: Layout,
        memory: RankMemory,
        config: TransportConfig,
        clock: Clock,
        *,
        host: str,
        first_port: int = 0,
    ) -> None:
        self.layout = layout
        self._memory = memory
        self._config = config
        self._clock = clock
        self._rooms: dict[int, OutgoingTransfer] = {}
        self._early: OrderedDict[int, OutgoingTransfer] = OrderedDict()
        self._homes: dict[int, _Session] = {}
        self._sessions: dict[bytes, _Session] = {}
        self._tokens: dict[bytes, _Session] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._listener = data_tcp.listen(host, first_port + 1 if first_port else 0, config)
        self.data_port: int = self._listener.getsockname()[1]
        self._loop = ZmqLoop("prfaas-send-control", clock)
        try:
            self._control = self._loop.socket(zmq.ROUTER, host)
            self._control.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self._control.bind(endpoint(host or "0.0.0.0", first_port or 0))
        except zmq.ZMQError as error:
            self._listener.close()
            self._loop.context.destroy(linger=0)
            raise LocalError(
                f"mover control port {first_port} on {host} cannot be used: {error}. "
                "Set mover_port to a free range, or 0."
            ) from None
        bound = self._control.getsockopt_string(zmq.LAST_ENDPOINT)
        self.control_port = int(bound.rpartition(":")[2])
        self._loop.add(self._control, self._receive)
        self._loop.every(config.heartbeat_interval_s, self._expire)
        self._selector = selectors.DefaultSelector()
        self._stop_read, self._stop_write = socket.socketpair()

    def start(self) -> None:
        """Begin to listen."""
        self._loop.start()
        self._spawn(self._accept_loop, "prfaas-send-accept")

    def close(self, reason: str = "the prefill server stopped") -> None:
        """Fail every transfer, tell the decode ranks, end all threads, free the ports. Idempotent."""
        if self._closing:
            return
        self._closing = True
        for transfer in list(self._rooms.values()):
            self.abort(transfer, reason)
        drained = threading.Event()
        self._loop.call(drained.set)
        drained.wait(5.0)
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            self._lose(session, reason)
        self._loop.stop()
        self._stop_write.send(b"\0")
        for thread in self._threads:
            thread.join(10.0)
        self._listener.close()
        self._selector.close()
        self._stop_read.close()
        self._stop_write.close()

    # --- what the sender calls ------------------------------------------------------------------------------------

    def transfer(self, room: int) -> OutgoingTransfer:
        """The transfer of a new request; decode may have spoken of it already. Raises LocalError for a room in use."""
        with self._lock:
            if room in self._rooms:
                raise LocalError(f"bootstrap room {room} is in use by another request")
            transfer = self._early.pop(room, None) or OutgoingTransfer(room, self._clock)
            self._rooms[room] = transfer
            return transfer

    def send(
        self,
        transfer: OutgoingTransfer,
        component: int,
        first_item: int,
        indices: Indices,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        """Put items `first_item`... of a component on their way; they lie at `indices`. `ready` is called before the
        memory is read, and may wait for a device. Returns at once."""
        session = self._homes.get(transfer.room)
        chunk_bytes = min(self._config.chunk_bytes, session.hello.chunk_bytes if session else 1 << 62)
        spans = list(
            cut(component, self.layout.components[component].item_bytes, first_item, len(indices), chunk_bytes)
        )
        with transfer.lock:
            if not transfer.queue(component, first_item, len(indices), len(spans)):
                return
        if session is None or session.closed:
            self.abort(transfer, "the connection to the decode server was lost")
            return
        session.put([_Task(transfer, span, indices, first_item, ready) for span in spans])

    def finish(self, transfer: OutgoingTransfer) -> None:
        """Nothing more will be sent for this request."""
        with transfer.lock:
            transfer.last_queued = True
            transfer.progress_s = self._clock.now_s()

    def abort(self, transfer: OutgoingTransfer, reason: str) -> None:
        """End a transfer and tell decode why. From here on its pages are not read any more. Idempotent."""
        with transfer.lock:
            ended = transfer.fail(reason)
        if ended:
            self._tell_failed(transfer, reason)

    def release(self, transfer: OutgoingTransfer) -> None:
        """Forget a request; ends it first where it is still live."""
        self.abort(transfer, "the request ended on the prefill side")
        with self._lock:
            if self._rooms.get(transfer.room) is transfer:
                del self._rooms[transfer.room]
            session = self._homes.pop(transfer.room, None)
            if session is not None and transfer.expected is not None:
                session.transfers.pop(transfer.expected.transfer_id, None)

    # --- control --------------------------------------------------------------------------------------------------

    def _reply(self, identity: bytes, message: Message) -> None:
        self._control.send_multipart([identity, encode(message)], zmq.NOBLOCK)

    def _tell_failed(self, transfer: OutgoingTransfer, reason: str) -> None:
        session = self._homes.get(transfer.room)
        expected = transfer.expected
        if session is not None and expected is not None:
            message = Failed(expected.transfer_id, transfer.room, reason[:4096])
            self._loop.call(lambda: self._reply(session.identity, message))

    def _receive(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            return
        identity = frames[0].bytes
        try:
            message = decode_to_prefill(frames[1].bytes)
        except ProtocolError as error:
            logger.warning("prfaas: control message refused: %s", error)
            self._reply(identity, Refuse(str(error)[:4096]))
            return
        if isinstance(message, Hello):
            self._hello(identity, message)
            return
        session = self._sessions.get(identity)
        if session is None:
            if isinstance(message, Abort):
                self._aborted(message)
            else:
                self._reply(identity, Unknown())
            return
        session.seen_s = self._clock.now_s()
        if isinstance(message, Expect):
            self._expect(session, message)
        elif isinstance(message, Done):
            transfer = session.transfers.get(message.transfer_id)
            if transfer is not None and transfer.room == message.room:
                with transfer.lock:
                    transfer.done()
        elif isinstance(message, Abort):
            self._aborted(message)
        elif isinstance(message, Ping):
            self._reply(identity, Pong())

    def _hello(self, identity: bytes, hello: Hello) -> None:
        who = f"{hello.site}/{hello.server}"
        problems = differences(self.layout, hello.layout)
        if hello.version != PROTOCOL_VERSION:
            problems = [f"protocol version: prefill has {PROTOCOL_VERSION}, decode has {hello.version}"]
        elif len(self._sessions) >= MAX_SESSIONS:
            problems = [f"this prefill rank serves {MAX_SESSIONS} decode ranks already"]
        if problems:
            reason = "layout mismatch: " + "; ".join(problems)
            logger.error("prfaas: decode %s refused, %s", who, reason)
            self._reply(identity, Refuse(reason[:4096]))
            return
        old = self._sessions.get(identity)
        if old is not None:
            self._lose(old, "the decode server opened a new session")
        session = _Session(identity, hello, self._clock.now_s())
        with self._lock:
            self._sessions[identity] = session
            self._tokens[session.token] = session
        logger.info("prfaas: decode %s connects with %d data connections", who, hello.connections)
        self._reply(identity, Welcome(session.token, self.data_port))

    def _expect(self, session: _Session, message: Expect) -> None:
        if len(message.counts) != len(self.layout.components):
            self._reply(session.identity, Failed(message.transfer_id, message.room, "wrong number of components"))
            return
        with self._lock:
            transfer = self._rooms.get(message.room)
            if transfer is None:
                transfer = self._early_room(message.room)
            taken = transfer.expected is not None
            if not taken:
                self._homes[message.room] = session
                session.transfers[message.transfer_id] = transfer
        with transfer.lock:
            transfer.expect(message)
            failed, reason = transfer.state is State.FAILED, transfer.reason
        if failed:
            self._reply(session.identity, Failed(message.transfer_id, message.room, reason[:4096]))
            if taken:
                self._tell_failed(transfer, reason)

    def _early_room(self, room: int) -> OutgoingTransfer:
        """A room decode speaks of first. Under the lock."""
        transfer = self._early.get(room)
        if transfer is None:
            transfer = self._early[room] = OutgoingTransfer(room, self._clock)
            if len(self._early) > MAX_EARLY_ROOMS:
                self._forget_early(next(iter(self._early)))
        return transfer

    def _forget_early(self, room: int) -> None:
        transfer = self._early.pop(room)
        session = self._homes.pop(room, None)
        if session is not None and transfer.expected is not None:
            session.transfers.pop(transfer.expected.transfer_id, None)

    def _aborted(self, message: Abort) -> None:
        with self._lock:
            transfer = self._rooms.get(message.room) or self._early_room(message.room)
        with transfer.lock:
            transfer.fail(f"decode ended the request: {message.reason}")

    def _expire(self) -> None:
        now_s = self._clock.now_s()
        for session in list(self._sessions.values()):
            if now_s - session.seen_s > self._config.heartbeat_timeout_s:
                self._lose(session, f"{session} was silent for {now_s - session.seen_s:.1f} s")
        with self._lock:
            for room, transfer in list(self._early.items()):
                if now_s - transfer.created_s > self._config.waiting_timeout_s:
                    self._forget_early(room)

    def _lose(self, session: _Session, reason: str) -> None:
        """Close a session: its transfers fail, its connections close. Idempotent; from any thread."""
        with self._lock:
            if session.closed:
                return
            if self._sessions.get(session.identity) is session:
                del self._sessions[session.identity]
            self._tokens.pop(session.token, None)
            transfers = list(session.transfers.values())
        with session.condition:
            session.closed = True
            session.tasks.clear()
            session.condition.notify_all()
        for transfer in transfers:
            with transfer.lock:
                transfer.fail(f"connection to {session} lost: {reason}")
        for sock in session.sockets:
            data_tcp.close(sock)
        if not self._closing:
            logger.warning("prfaas: session with %s ended: %s", session, reason)

    # --- data -----------------------------------------------------------------------------------------------------

    def _spawn(self, target: Callable[..., None], name: str, *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _accept_loop(self) -> None:
        """Accept data connections, read their prefaces, and notice at once when a peer closes one."""
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._stop_read, selectors.EVENT_READ, None)
        pending: dict[socket.socket, tuple[bytearray, float]] = {}
        while True:
            for key, _ in self._selector.select(timeout=1.0):
                if key.fileobj is self._stop_read:
                    for sock in pending:
                        sock.close()
                    return
                if key.fileobj is self._listener:
                    self._accept(pending)
                elif isinstance(key.data, _Session):
                    self._selector.unregister(key.fileobj)
                    self._lose(key.data, "it closed a data connection")
                elif isinstance(key.fileobj, socket.socket):
                    self._read_preface(key.fileobj, pending)
            now_s = self._clock.now_s()
            for sock, (_, since_s) in list(pending.items()):
                if now_s - since_s > self._config.handshake_timeout_s:
                    self._drop(sock, pending, "no preface in time")

    def _accept(self, pending: dict[socket.socket, tuple[bytearray, float]]) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            logger.warning("prfaas: a data connection could not be accepted: %s", error)
            return
        if len(pending) >= MAX_PENDING_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        pending[sock] = (bytearray(), self._clock.now_s())
        self._selector.register(sock, selectors.EVENT_READ, None)

    def _drop(self, sock: socket.socket, pending: dict[socket.socket, tuple[bytearray, float]], reason: str) -> None:
        self._selector.unregister(sock)
        del pending[sock]
        sock.close()
        logger.warning("prfaas: data connection refused: %s", reason)

    def _read_preface(self, sock: socket.socket, pending: dict[socket.socket, tuple[bytearray, float]]) -> None:
        data = pending[sock][0]
        try:
            more = sock.recv(PREFACE.size - len(data))
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(sock, pending, str(error))
            return
        if not more:
            self._drop(sock, pending, "closed before its preface")
            return
        data += more
        if len(data) < PREFACE.size:
            return
        try:
            preface = unpack_preface(bytes(data))
        except ProtocolError as error:
            self._drop(sock, pending, str(error))
            return
        with self._lock:
            session = self._tokens.get(preface.token)
            full = session is not None and len(session.sockets) >= session.hello.connections
            if session is not None and not full:
                session.sockets.append(sock)
        if session is None or full:
            self._drop(sock, pending, "its token belongs to no session that waits for it")
            return
        del pending[sock]
        sock.setblocking(True)
        try:
            data_tcp.tune(sock, self._config)
        except PrfaasError as error:
            self._lose(session, str(error))
            return
        self._selector.modify(sock, selectors.EVENT_READ, session)
        self._spawn(self._send_loop, "prfaas-send-data", session, sock)

    def _send_loop(self, session: _Session, sock: socket.socket) -> None:
        """One data connection: take the next chunk, copy it out under the transfer's lock, send it."""
        staging = np.empty(max(self._config.chunk_bytes, 1), dtype=np.uint8)
        while (task := session.next_task()) is not None:
            transfer, span = task.transfer, task.span
            out = staging[: span.length]
            try:
                task.ready()
                with transfer.lock:
                    if not transfer.live or transfer.expected is None:
                        continue
                    self._memory.components[span.component][span.buffer].gather(
                        task.indices, task.first_item, span.offset, out
                    )
                    transfer_id = transfer.expected.transfer_id
                header = ChunkHeader(transfer_id, span.component, span.buffer, span.offset, span.length)
                data_tcp.send_all(sock, pack_header(header, out.data), out.data)
                with transfer.lock:
                    transfer.sent(span.length)
            except PeerError as error:
                self._lose(session, str(error))
                return
            except Exception as error:
                logger.exception("prfaas: a chunk of room %d could not be read", transfer.room)
                self.abort(transfer, f"prefill could not read a chunk: {error}")
