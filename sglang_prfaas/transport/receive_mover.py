"""The mover of a decode rank: sessions with prefill ranks, and the chunks that arrive from them."""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import zmq

from sglang_prfaas.clock import Clock, Deadline
from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.errors import ChecksumError, LocalError, PeerGoneError, ProtocolError
from sglang_prfaas.transport.addresses import endpoint
from sglang_prfaas.transport.codec.session import RAW, SessionCodec, obstacle, offered
from sglang_prfaas.transport.health import REFUSALS, Contact
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.link_tuning import check_links, for_link, kernel_buffers
from sglang_prfaas.transport.lookup import DirectoryClient
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.mailbox import ENVELOPE, unseal
from sglang_prfaas.transport.memory import Indices, RankMemory
from sglang_prfaas.transport.messages import (
    MAX_REQUEST_BYTES,
    PROTOCOL_VERSION,
    Abort,
    Bye,
    Directory,
    Done,
    Expect,
    Failed,
    Hello,
    Message,
    Ping,
    Redial,
    Refuse,
    Unknown,
    Welcome,
    decode_to_decode,
    encode,
    reason_text,
)
from sglang_prfaas.transport.part_memory import PrefillRank, decode_view
from sglang_prfaas.transport.receive_data import DataReceiver
from sglang_prfaas.transport.receive_session import Incoming, PeerSession
from sglang_prfaas.transport.resolver import resolve_in_background
from sglang_prfaas.transport.security import ServerKeys, load_security
from sglang_prfaas.transport.security.curve import Loss
from sglang_prfaas.transport.security.peers import Watch

__all__ = ["Incoming", "PeerSession", "ReceiveMover"]

logger = logging.getLogger(__name__)

TICK_S = 0.25
PROBE_TIMEOUT_S = 3.0
PROBE_PAUSE_S = 0.2
FAREWELL_MS = 1000
"""How long the last messages of a session may take to leave."""


class ReceiveMover:
    """Receives items into `memory` from prefill ranks. Dials; listens on nothing. Safe to call from any thread.

    Raises ConfigError for keys that do not fit."""

    def __init__(
        self,
        layout: Layout,
        memory: RankMemory,
        config: TransportConfig,
        clock: Clock,
        *,
        site: str = "",
        server: str = "",
        rank: int = 0,
        links: Mapping[str, LinkConfig] | None = None,
    ) -> None:
        """links: as configured, by the site they lead to."""
        self.layout = layout
        self._links = links or {}
        self._buffers = kernel_buffers("receive")
        check_links(self._links, config, self._buffers)
        self._memory = memory
        self._config = config
        self._clock = clock
        self._site = site
        self._server = server
        self._rank = rank
        self._instance = secrets.token_bytes(16)
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._sessions: dict[tuple[str, int], PeerSession] = {}
        self._closing = False
        self._offers = offered(config.accept_codecs)
        self._security = load_security(config)
        self._server_keys = ServerKeys(self._security.server_keys)
        self._data = DataReceiver(config, self._security, clock, lose=self._lose, complete=self._tell_done)
        self._loop = ZmqLoop("prfaas-receive-control", clock, self._security)
        self._loop.every(min(config.heartbeat_interval_s, TICK_S), self._tick)
        self._loop.on_list_change(self._list_changed)
        self._directories = DirectoryClient(self._loop, clock, config.handshake_timeout_s, self._server_keys)
        self._last_ping_s = self._last_tick_s = clock.now_s()

    def start(self) -> None:
        self._loop.start()

    def close(self, reason: str = "the decode server stopped") -> None:
        """Fail every transfer, tell the prefill ranks, end all threads. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            sessions = list(self._sessions.values())
        for session in sessions:
            with session.lock:
                items = list(session.incoming.values())
            for item in items:
                self.abort(item, reason)
        self._loop.flush()
        for session in sessions:
            self._lose(session, reason)
        self._loop.stop(linger_ms=FAREWELL_MS)
        self._data.join(10.0)

    # --- finding prefill ranks ------------------------------------------------------------------------------------

    def directory(self, host: str, port: int) -> Directory | None:
        """The ranks behind a bootstrap address, or None while they are being asked for. Never waits."""
        return self._directories.get(host, port)

    def directory_problem(self, host: str, port: int) -> str:
        """Why the directory will not answer for now, or an empty string."""
        return self._directories.problem(host, port)

    def forget(self, host: str, port: int) -> None:
        """Ask the directory again before the next session."""
        self._directories.forget(f"{host}:{port}")

    # --- sessions -------------------------------------------------------------------------------------------------

    def session(
        self, address: str, host: str, control_port: int, room: int | None = None, rank: PrefillRank | None = None
    ) -> PeerSession:
        """The session with a prefill rank, opened where there is none. Look at its `up` and `failure`. Never waits.

        `address`: the bootstrap address it was found at, asked again once the session fails. `room`: the request that
        needs it; should the session fail before `leave`, the prefill rank is told that this request has ended. `rank`:
        None where it is as here."""
        with self._lock:
            session = self._sessions.get((host, control_port))
            if session is not None and self._enter(session, room):
                return session
            deadline = Deadline(self._clock, self._config.handshake_timeout_s)
            view = decode_view(self.layout, self._memory, rank or PrefillRank(self.layout.tp_size, self.layout.tp_rank))
            session = PeerSession(address, host, control_port, deadline, self._config, self._clock.now_s(), view)
            if self._closing:
                session.failure = f"{session}: the decode server is stopping"
                return session
            self._enter(session, room)
            self._sessions[host, control_port] = session
        resolve_in_background(
            host,
            found=lambda numeric: self._loop.call(lambda: self._open(session, numeric)),
            failed=lambda reason: self._lose(session, reason),
        )
        return session

    def leave(self, session: PeerSession, room: int) -> None:
        """The request of `room` does not need the session any more."""
        with session.lock:
            session.rooms -= Counter((room,))

    @staticmethod
    def _enter(session: PeerSession, room: int | None) -> bool:
        """Note that a request needs the session. Returns False where it has failed."""
        with session.lock:
            if session.failure:
                return False
            if room is not None:
                session.rooms[room] += 1
            return True

    def _open(self, session: PeerSession, host: str) -> None:
        if session.failure:
            return
        try:
            session.server = self._server_keys.get(session.address)
        except LocalError as error:
            self._lose(session, str(error))
            return
        sock = self._loop.socket(zmq.DEALER, host, session.server)
        sock.setsockopt(zmq.ROUTING_ID, session.identity)
        # ZeroMQ's own heartbeats make it dial again over a link that was cut in silence: TCP would wait ever longer.
        sock.setsockopt(zmq.HEARTBEAT_IVL, math.ceil(self._config.heartbeat_interval_s * 1000))
        sock.setsockopt(zmq.HEARTBEAT_TIMEOUT, math.ceil(self._config.heartbeat_timeout_s * 1000))
        session.control = sock
        self._loop.add(sock, lambda frames: self._receive(session, host, frames))
        self._loop.on_loss(
            sock,
            lambda loss: self._control_lost(session, host, loss),
            session.server,
            found=lambda: self._control_found(session),
        )
        try:
            sock.connect(endpoint(host, session.control_port))
        except zmq.ZMQError as error:
            self._lose(session, f"its control port cannot be dialled: {error}")
            return
        config = for_link(self._config, self._links.get(session.server.site), self._buffers)
        hello = session.hello = Hello(
            PROTOCOL_VERSION,
            self._site,
            self._server,
            self.layout,
            config.connections,
            config.chunk_bytes,
            self._instance,
            self._rank,
            self._offers,
            session.view.peer_page_tokens,
        )
        if len(encode(hello)) + ENVELOPE.size > MAX_REQUEST_BYTES:
            self._lose(session, f"the layout of this rank takes more than the {MAX_REQUEST_BYTES} bytes of a message")
            return
        self._send(session, session.mailbox.unnumbered(encode(hello)))
        for message in session.unsent:
            self._tell(session, message)
        session.unsent.clear()

    def _control_lost(self, session: PeerSession, host: str, loss: Loss) -> None:
        """ZeroMQ dials again by itself; what was said meanwhile is said again then."""
        if session.failure:
            return
        if loss.refused:
            self._server_keys.refused(session.address, session.server)
        if (loss.refused and loss.certain) or not session.up:
            self._lose(session, loss.reason)
            return
        if not session.connected:
            return  # an attempt to dial again has failed; there will be others
        session.connected = False
        with session.lock:
            session.health.control_lost(self._clock.now_s())
        logger.info("prfaas: control connection of %s lost: %s; dialled again", session, loss.reason)
        threading.Thread(target=self._probe, args=(session, host), name="prfaas-probe", daemon=True).start()

    def _probe(self, session: PeerSession, host: str) -> None:
        """Find out whether the process is gone: then its control port refuses. In a short-lived thread."""
        for _ in range(REFUSALS):
            try:
                socket.create_connection((host, session.control_port), PROBE_TIMEOUT_S).close()
                return
            except ConnectionRefusedError:
                with session.lock:
                    session.health.refused(-1)
            except OSError:
                return  # it says nothing of the process
            if session.ended.wait(PROBE_PAUSE_S):
                return
        self._judge(session)

    def _control_found(self, session: PeerSession) -> None:
        session.connected = True
        with session.lock:
            session.health.control_found(self._clock.now_s())
        if not session.was_connected:
            session.was_connected = True
            return  # whatever was said so far is on its way
        if not session.instance and session.hello is not None:
            self._send(session, session.mailbox.unnumbered(encode(session.hello)))
        for envelope in session.mailbox.resend(self._clock.now_s(), at_once=True):
            self._send(session, envelope)

    def _judge(self, session: PeerSession) -> bool:
        """Whether the session goes on."""
        with session.lock:
            why = session.health.verdict(self._clock.now_s())
        if why:
            self._lose(session, why)
        return not why

    def _tell(self, session: PeerSession, message: Message) -> None:
        """Say what has to arrive, from within the loop; kept until there is a control socket."""
        if session.control is None:
            session.unsent.append(message)
            return
        try:
            self._send(session, session.mailbox.post(encode(message), self._clock.now_s()))
        except LocalError as error:
            self._lose(session, str(error))

    @staticmethod
    def _send(session: PeerSession, envelope: bytes) -> None:
        """Send on the control socket. What cannot be sent now is sent again later."""
        if session.control is None or session.control.closed:
            return
        try:
            session.control.send(envelope, zmq.NOBLOCK)
        except zmq.Again:
            pass

    def _receive(self, session: PeerSession, host: str, frames: list[zmq.Frame]) -> None:
        now_s = self._clock.now_s()
        session.health.heard(now_s)
        try:
            number, acknowledged, body = unseal(frames[-1].bytes)
            if not session.mailbox.accept(number, acknowledged, now_s):
                return
            message = decode_to_decode(body)
        except ChecksumError as error:
            logger.warning("prfaas: %s: %s", session, error)
            return  # it comes again
        except ProtocolError as error:
            self._lose(session, str(error))
            return
        if isinstance(message, Welcome):
            if not session.instance:
                layout = session.view.layout
                why = obstacle(message.codec, layout, self._offers, self._config.chunk_bytes)
                if message.codec != RAW and why:
                    self._lose(session, f"it would encode KVCache as {message.codec}: {why}")
                    return
                session.codec = SessionCodec(message.codec, layout)
                session.instance = message.instance
                self._tune(session, message)
                self._data.dial(session, host, message)
            elif message.instance != session.instance:
                self._lose(session, "its process has restarted")
        elif isinstance(message, Refuse):
            self._lose(session, message.reason)
        elif isinstance(message, Failed):
            item = session.incoming.get(message.transfer_id)
            if item is not None:
                with item.transfer.lock:
                    item.transfer.fail(f"prefill gave the request up: {message.reason}")
                    item.transfer.peer_knows = True
        elif isinstance(message, Redial):
            with session.lock:
                connection = session.connections.get(message.index)
            if connection is not None:
                connection.cut()
        elif isinstance(message, Unknown) and session.instance:
            restarted = message.instance != session.instance
            self._lose(session, "its process has restarted" if restarted else "it has given this session up")

    def _tune(self, session: PeerSession, welcome: Welcome) -> None:
        """The data connections as they are to be for the link to the prefill rank's site."""
        assert session.hello is not None
        link = self._links.get(session.server.site or welcome.site)
        connections = welcome.connections or session.hello.connections
        fixed = msgspec.structs.replace(link, connections=connections) if link is not None else None
        tuned = for_link(self._config, fixed, self._buffers)
        session.config = msgspec.structs.replace(tuned, connections=connections)
        with session.lock:
            session.health.expects(connections)

    def _tick(self) -> None:
        self._directories.tick()
        config = self._config
        now_s = self._clock.now_s()
        stalled_s, self._last_tick_s = now_s - self._last_tick_s, now_s
        stalled = stalled_s > config.heartbeat_timeout_s / 2
        ping = now_s - self._last_ping_s >= config.heartbeat_interval_s
        if ping:
            self._last_ping_s = now_s
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            if not session.up and session.deadline.expired:
                self._lose(session, f"no session within {config.handshake_timeout_s:g} s")
                continue
            if not stalled:
                if not self._judge(session):
                    continue
                self._renew_if_silent(session, now_s)
            if session.control is None or not session.connected:
                continue
            for envelope in session.mailbox.resend(now_s):
                self._send(session, envelope)
            if ping or session.mailbox.owing or session.health.contact is Contact.SUSPENDED:
                self._send(session, session.mailbox.unnumbered(encode(Ping())))

    def _list_changed(self, watch: Watch) -> None:
        """End what stands of sites, keys and certificates that are not let in any more."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            site, key = session.server.site, session.server.public.decode()
            if site and not watch.has_key(site, key):
                self._lose(session, f"its key {key} is not in peers.toml any more")
                continue
            with session.lock:
                connections = list(session.connections.values())
            for connection in connections:
                if connection.certificate and not watch.has_certificate(site, connection.certificate):
                    logger.warning(
                        "prfaas: %s: its certificate %s is not in peers.toml any more", session, connection.certificate
                    )
                    connection.cut()

    def _renew_if_silent(self, session: PeerSession, now_s: float) -> None:
        """Cut the data connections of a prefill rank that has fallen silent; their threads dial them again."""
        with session.lock:
            silent = session.health.silent(now_s)
            connections = list(session.connections.values())
        if silent:
            logger.warning("prfaas: %s is silent; its %d data connections are made anew", session, len(connections))
            for connection in connections:
                connection.cut()

    def _lose(self, session: PeerSession, reason: str) -> None:
        """Close a session: its transfers fail, its connections close. Idempotent; from any thread."""
        with session.lock:
            if session.failure:
                return
            session.failure = f"{session}: {reason}"
            session.up = False
            session.health.lose()
            session.ended.set()
            items = list(session.incoming.values())
            ended = [(item.transfer.room, item.transfer.transfer_id) for item in items if item.transfer.live]
            unexpected = session.rooms - Counter(item.transfer.room for item in items)
            ended += [(room, 0) for room in unexpected.elements()]
            connections = list(session.connections.values())
        with self._lock:
            if self._sessions.get((session.host, session.control_port)) is session:
                del self._sessions[session.host, session.control_port]
        self._directories.forget(session.address)
        for item in items:
            with item.transfer.lock:
                item.transfer.fail(session.failure)
        for connection in connections:
            connection.cut()
        self._loop.call(lambda: self._end_control(session, ended))
        if not self._closing:
            logger.warning("prfaas: session with %s", session.failure)

    def _end_control(self, session: PeerSession, ended: list[tuple[int, int]]) -> None:
        """Tell prefill, if it still listens, which requests ended with the session; then close the control socket."""
        if session.control is None:
            return
        session.control.setsockopt(zmq.LINGER, FAREWELL_MS)
        for room, transfer_id in ended:
            self._tell(session, Abort(room, reason_text(session.failure), transfer_id))
        self._tell(session, Bye(reason_text(session.failure)))
        self._loop.remove(session.control)

    # --- requests -------------------------------------------------------------------------------------------------

    def expect(
        self, session: PeerSession, room: int, indices: Sequence[Indices], cached_prefix_tokens: int
    ) -> Incoming:
        """Tell prefill what is expected; `indices[c]` are the slots of component c that its items go to.

        Raises PeerGoneError where the session has failed, LocalError for slots that do not exist."""
        if len(indices) != len(self.layout.components):
            raise LocalError(f"{len(indices)} components given, the layout has {len(self.layout.components)}")
        checked = tuple(session.view.checked(c, values) for c, values in enumerate(indices))
        counts = tuple(len(values) for values in checked)
        transfer = IncomingTransfer(room, next(self._ids), session.view.layout, counts, self._clock)
        item = Incoming(transfer, checked, session)
        transfer.codec = session.codec.name
        with session.lock:
            if session.failure:
                raise PeerGoneError(session.failure)
            session.incoming[transfer.transfer_id] = item
        message = Expect(transfer.transfer_id, room, counts, cached_prefix_tokens)
        self._loop.call(lambda: self._tell(session, message))
        if not transfer.live:
            self._tell_done(session, transfer)
        return item

    def abort(self, item: Incoming, reason: str) -> None:
        """End a transfer and tell prefill. From here on its pages are not written any more. Idempotent."""
        with item.transfer.lock:
            ended = item.transfer.fail(reason)
        if ended:
            self._tell_aborted(item.session, item.transfer.room, reason, item.transfer.transfer_id)

    def abort_room(self, session: PeerSession, room: int, reason: str) -> None:
        """Tell prefill that a request has ended for which nothing was expected yet."""
        self._tell_aborted(session, room, reason, 0)

    def _tell_aborted(self, session: PeerSession, room: int, reason: str, transfer_id: int) -> None:
        self._loop.call(lambda: self._tell(session, Abort(room, reason_text(reason), transfer_id)))

    def release(self, item: Incoming) -> None:
        """Forget a request; ends it first where it is still live. Late chunks of it are drained and dropped."""
        self.abort(item, "the request ended on the decode side")
        with item.session.lock:
            item.session.incoming.pop(item.transfer.transfer_id, None)

    def _tell_done(self, session: PeerSession, transfer: IncomingTransfer) -> None:
        message = Done(transfer.transfer_id, transfer.room)
        self._loop.call(lambda: self._tell(session, message))
