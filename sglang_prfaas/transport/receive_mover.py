"""The mover of a decode rank: sessions with prefill ranks, and the chunks that arrive from them."""

from __future__ import annotations

import itertools
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Sequence

import numpy as np
import zmq

from sglang_prfaas.clock import Clock, Deadline
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.errors import LocalError, PeerError, PeerGoneError, PrfaasError, ProtocolError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.framing import HEADER_BYTES, ChunkHeader, Preface, unpack_header, verify
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.loop import ZmqLoop, endpoint
from sglang_prfaas.transport.memory import Bytes, Indices, RankMemory
from sglang_prfaas.transport.messages import (
    PROTOCOL_VERSION,
    Abort,
    Directory,
    Done,
    Expect,
    Failed,
    Hello,
    Lookup,
    Message,
    Ping,
    Pong,
    Refuse,
    Welcome,
    decode_from_directory,
    decode_to_decode,
    encode,
)
from sglang_prfaas.transport.session import IncomingTransfer

logger = logging.getLogger(__name__)


class Incoming:
    """A request's transfer and where its items belong."""

    def __init__(self, transfer: IncomingTransfer, indices: tuple[Indices, ...], session: PeerSession) -> None:
        self.transfer = transfer
        self.indices = indices
        self.session = session


class PeerSession:
    """One prefill rank as decode sees it: connecting, up, or failed with a reason."""

    def __init__(self, address: str, host: str, control_port: int) -> None:
        self.address = address
        self.host = host
        self.control_port = control_port
        self.identity = secrets.token_bytes(16)
        self.up = False
        self.failure = ""
        self.incoming: dict[int, Incoming] = {}
        self.rooms: set[int] = set()
        """Requests that wait for this session or use it."""
        self.sockets: list[socket.socket] = []
        self.lock = threading.Lock()
        self.control: zmq.Socket[bytes] | None = None
        self.deadline: Deadline | None = None
        self.seen_s = 0.0

    def __str__(self) -> str:
        return f"prefill {self.host}:{self.control_port}"


class ReceiveMover:
    """Receives items into `memory` from prefill ranks. Dials; listens on nothing. Safe to call from any thread."""

    def __init__(
        self,
        layout: Layout,
        memory: RankMemory,
        config: TransportConfig,
        clock: Clock,
        *,
        site: str = "",
        server: str = "",
    ) -> None:
        self.layout = layout
        self._memory = memory
        self._config = config
        self._clock = clock
        self._site = site
        self._server = server
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._sessions: dict[tuple[str, int], PeerSession] = {}
        self._directories: dict[str, Directory] = {}
        self._lookups: dict[str, tuple[zmq.Socket[bytes], Deadline]] = {}
        self._threads: list[threading.Thread] = []
        self._closing = False
        self._loop = ZmqLoop("prfaas-receive-control", clock)
        self._loop.every(min(config.heartbeat_interval_s, 1.0), self._tick)
        self._last_ping_s = clock.now_s()

    def start(self) -> None:
        self._loop.start()

    def close(self, reason: str = "the decode server stopped") -> None:
        """Fail every transfer, tell the prefill ranks, end all threads. Idempotent."""
        if self._closing:
            return
        self._closing = True
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            for item in list(session.incoming.values()):
                self.abort(item, reason)
        drained = threading.Event()
        self._loop.call(drained.set)
        drained.wait(5.0)
        for session in sessions:
            self._lose(session, reason)
        self._loop.stop()
        for thread in self._threads:
            thread.join(10.0)

    # --- finding prefill ranks ------------------------------------------------------------------------------------

    def directory(self, host: str, port: int) -> Directory | None:
        """The ranks behind a bootstrap address, or None while they are being asked for. Never waits."""
        address = f"{host}:{port}"
        with self._lock:
            found = self._directories.get(address)
        if found is None:
            self._loop.call(lambda: self._look_up(address, host, port))
        return found

    def _look_up(self, address: str, host: str, port: int) -> None:
        if address in self._lookups or self._closing:
            return
        sock = self._loop.socket(zmq.DEALER, host)
        sock.connect(endpoint(host, port))
        sock.send(encode(Lookup()), zmq.NOBLOCK)
        self._lookups[address] = (sock, Deadline(self._clock, self._config.handshake_timeout_s))
        self._loop.add(sock, lambda frames: self._found(address, frames))

    def _found(self, address: str, frames: list[zmq.Frame]) -> None:
        entry = self._lookups.pop(address, None)
        if entry is not None:
            self._loop.remove(entry[0])
        try:
            message = decode_from_directory(frames[-1].bytes)
        except ProtocolError as error:
            logger.warning("prfaas: bootstrap directory %s: %s", address, error)
            return
        if isinstance(message, Directory) and message.complete:
            with self._lock:
                self._directories[address] = message

    def forget(self, host: str, port: int) -> None:
        """Ask the directory again before the next session."""
        with self._lock:
            self._directories.pop(f"{host}:{port}", None)

    # --- sessions -------------------------------------------------------------------------------------------------

    def session(self, address: str, host: str, control_port: int, room: int | None = None) -> PeerSession:
        """The session with a prefill rank, opened where there is none. Look at its `up` and `failure`.

        `address`: the bootstrap address it was found at, asked again once the session fails. `room`: the request that
        needs it; should the session fail before `leave`, the prefill rank is told that this request has ended."""
        with self._lock:
            session = self._sessions.get((host, control_port))
            known = session is not None and not session.failure
            if session is None or not known:
                session = self._sessions[host, control_port] = PeerSession(address, host, control_port)
            if room is not None:
                session.rooms.add(room)
        if known:
            return session
        self._loop.call(lambda: self._open(session))
        return session

    def leave(self, session: PeerSession, room: int) -> None:
        """The request of `room` does not need the session any more."""
        with self._lock:
            session.rooms.discard(room)

    def _open(self, session: PeerSession) -> None:
        session.deadline = Deadline(self._clock, self._config.handshake_timeout_s)
        session.seen_s = self._clock.now_s()
        sock = self._loop.socket(zmq.DEALER, session.host)
        sock.setsockopt(zmq.ROUTING_ID, session.identity)
        sock.connect(endpoint(session.host, session.control_port))
        session.control = sock
        self._loop.add(sock, lambda frames: self._receive(session, frames))
        config = self._config
        self._tell(
            session,
            Hello(PROTOCOL_VERSION, self._site, self._server, self.layout, config.connections, config.chunk_bytes),
        )

    def _tell(self, session: PeerSession, message: Message) -> None:
        """Send on the control socket, from within the loop."""
        if session.control is not None and not session.control.closed:
            session.control.send(encode(message), zmq.NOBLOCK)

    def _receive(self, session: PeerSession, frames: list[zmq.Frame]) -> None:
        session.seen_s = self._clock.now_s()
        try:
            message = decode_to_decode(frames[-1].bytes)
        except ProtocolError as error:
            self._lose(session, str(error))
            return
        if isinstance(message, Welcome):
            if not session.sockets and not session.up:
                self._dial(session, message)
        elif isinstance(message, Refuse):
            self._lose(session, message.reason)
        elif isinstance(message, Failed):
            item = session.incoming.get(message.transfer_id)
            if item is not None:
                with item.transfer.lock:
                    item.transfer.fail(f"prefill gave the request up: {message.reason}")
        elif not isinstance(message, Pong):
            self._lose(session, "the prefill server does not know this session, it has restarted")

    def _tick(self) -> None:
        now_s = self._clock.now_s()
        for address, (sock, deadline) in list(self._lookups.items()):
            if deadline.expired:
                del self._lookups[address]
                self._loop.remove(sock)
        ping = now_s - self._last_ping_s >= self._config.heartbeat_interval_s
        if ping:
            self._last_ping_s = now_s
        for session in list(self._sessions.values()):
            if session.failure:
                continue
            if not session.up:
                if session.deadline is not None and session.deadline.expired:
                    self._lose(session, f"no session within {self._config.handshake_timeout_s:g} s")
            elif now_s - session.seen_s > self._config.heartbeat_timeout_s:
                self._lose(session, f"silent for {now_s - session.seen_s:.1f} s")
            elif ping:
                self._tell(session, Ping())

    def _lose(self, session: PeerSession, reason: str) -> None:
        """Close a session: its transfers fail, its connections close. Idempotent; from any thread."""
        with session.lock:
            if session.failure:
                return
            session.failure = f"{session}: {reason}"
            session.up = False
            items = list(session.incoming.values())
            sockets = list(session.sockets)
        with self._lock:
            if self._sessions.get((session.host, session.control_port)) is session:
                del self._sessions[session.host, session.control_port]
            self._directories.pop(session.address, None)
            rooms = list(session.rooms)
        for item in items:
            with item.transfer.lock:
                item.transfer.fail(session.failure)
        for sock in sockets:
            data_tcp.close(sock)
        control = session.control
        if control is not None:
            self._loop.call(lambda: self._end_control(session, control, rooms))
        if not self._closing:
            logger.warning("prfaas: session with %s", session.failure)

    def _end_control(self, session: PeerSession, control: zmq.Socket[bytes], rooms: list[int]) -> None:
        """Tell prefill, if it still listens, which requests ended with the session; then close the control socket."""
        control.setsockopt(zmq.LINGER, 1000)
        for room in rooms:
            self._tell(session, Abort(room, session.failure[:4096]))
        self._loop.remove(control)

    # --- requests -------------------------------------------------------------------------------------------------

    def expect(
        self, session: PeerSession, room: int, indices: Sequence[Indices], cached_prefix_tokens: int
    ) -> Incoming:
        """Tell prefill what is expected; `indices[c]` are the slots of component c that its items go to.

        Raises PeerGoneError where the session has failed, LocalError for slots that do not exist."""
        checked = tuple(self._memory.checked(c, values) for c, values in enumerate(indices))
        if len(checked) != len(self.layout.components):
            raise LocalError(f"{len(checked)} components given, the layout has {len(self.layout.components)}")
        counts = tuple(len(values) for values in checked)
        transfer = IncomingTransfer(room, next(self._ids), self.layout, counts, self._clock)
        item = Incoming(transfer, checked, session)
        with session.lock:
            if session.failure:
                raise PeerGoneError(session.failure)
            session.incoming[transfer.transfer_id] = item
        message = Expect(transfer.transfer_id, room, counts, cached_prefix_tokens)
        self._loop.call(lambda: self._tell(session, message))
        return item

    def abort(self, item: Incoming, reason: str) -> None:
        """End a transfer and tell prefill. From here on its pages are not written any more. Idempotent."""
        with item.transfer.lock:
            ended = item.transfer.fail(reason)
        if ended:
            self.abort_room(item.session, item.transfer.room, reason)

    def abort_room(self, session: PeerSession, room: int, reason: str) -> None:
        """Tell prefill that a room has ended, also when nothing was ever expected for it."""
        self._loop.call(lambda: self._tell(session, Abort(room, reason[:4096])))

    def release(self, item: Incoming) -> None:
        """Forget a request; ends it first where it is still live. Late chunks of it are drained and dropped."""
        self.abort(item, "the request ended on the decode side")
        with item.session.lock:
            item.session.incoming.pop(item.transfer.transfer_id, None)

    # --- data -----------------------------------------------------------------------------------------------------

    def _spawn(self, target: Callable[..., None], name: str, *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads = [t for t in self._threads if t.is_alive()] + [thread]
        thread.start()

    def _dial(self, session: PeerSession, welcome: Welcome) -> None:
        connected = itertools.count(1)
        for index in range(self._config.connections):
            self._spawn(self._receive_loop, "prfaas-receive-data", session, welcome, index, connected)

    def _receive_loop(
        self, session: PeerSession, welcome: Welcome, index: int, connected: itertools.count[int]
    ) -> None:
        """One data connection: dial it, then place every chunk that comes."""
        try:
            sock = data_tcp.connect(session.host, welcome.data_port, self._config)
        except PrfaasError as error:
            self._lose(session, str(error))
            return
        with session.lock:
            if session.failure:
                sock.close()
                return
            session.sockets.append(sock)
        try:
            data_tcp.send_all(sock, Preface(index, welcome.token).pack())
            with session.lock:
                if next(connected) == self._config.connections and not session.failure:
                    session.up = True
            head = memoryview(bytearray(HEADER_BYTES))
            staging = np.empty(self._config.chunk_bytes, dtype=np.uint8)
            while data_tcp.receive_exactly(sock, head):
                header = unpack_header(head, self._config.chunk_bytes)
                payload = staging[: header.length]
                if not data_tcp.receive_exactly(sock, payload.data):
                    raise PeerGoneError("data connection closed after a chunk's header")
                verify(head, header, payload.data)
                self._place(session, header, payload)
            raise PeerGoneError("the prefill server closed a data connection")
        except PeerError as error:
            self._lose(session, str(error))
        except Exception as error:
            logger.exception("prfaas: receiving from %s failed", session)
            self._lose(session, f"a chunk could not be placed: {error}")

    def _place(self, session: PeerSession, header: ChunkHeader, payload: Bytes) -> None:
        item = session.incoming.get(header.transfer_id)
        if item is None:
            return  # a late chunk of a request that has ended: dropped, its pages may belong to another by now
        transfer = item.transfer
        with transfer.lock:
            if not transfer.live:
                return
            try:
                transfer.check(header)
            except ProtocolError as error:
                transfer.fail(str(error))
                raise
            self._memory.components[header.component][header.buffer].scatter(
                item.indices[header.component], 0, header.offset, payload
            )
            complete = transfer.received(header)
        if complete:
            message = Done(transfer.transfer_id, transfer.room)
            self._loop.call(lambda: self._tell(session, message))
