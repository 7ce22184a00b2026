"""The mover of a prefill rank: sessions with decode ranks, and the chunks on their way to them."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence

import msgspec
import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.core.link_counts import LinkCounts
from sglang_prfaas.errors import ChecksumError, LocalError, ProtocolError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.acceptor import Acceptor
from sglang_prfaas.transport.addresses import endpoint, resolve
from sglang_prfaas.transport.clients import Doomed
from sglang_prfaas.transport.codec.session import RAW, CodecChoice, SessionCodec, obstacle
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.framing import Preface
from sglang_prfaas.transport.handshake import refusal
from sglang_prfaas.transport.health import Contact
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.link_counters import LinkCounters
from sglang_prfaas.transport.link_monitor import LinkMonitor, Report, Traffic
from sglang_prfaas.transport.link_tuning import check_links, for_link, kernel_buffers
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.mailbox import seal, unseal
from sglang_prfaas.transport.memory import Indices, RankMemory
from sglang_prfaas.transport.messages import (
    Abort,
    Bye,
    Done,
    Expect,
    Failed,
    Hello,
    Message,
    Ping,
    Pong,
    Redial,
    Refuse,
    ToPrefill,
    Unknown,
    Welcome,
    decode_to_prefill,
    encode,
    reason_text,
)
from sglang_prfaas.transport.outbox import Task, at_hand
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.pacing import paced_chunk_bytes
from sglang_prfaas.transport.part_memory import SessionView, prefill_view
from sglang_prfaas.transport.rooms import Rooms
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.security.curve import KEY_PROPERTY
from sglang_prfaas.transport.security.peers import Watch
from sglang_prfaas.transport.security.refusals import RefusalLog
from sglang_prfaas.transport.send_data import SMALL_BYTES, DataSender
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.streams import cut
from sglang_prfaas.transport.transfer import State

logger = logging.getLogger(__name__)

MAX_SESSION_TRANSFERS = 4096
"""Requests that one decode rank may have open."""
TICK_S = 0.25
FAREWELL_MS = 1000
"""How long the last messages may take to leave when the mover closes."""


class SendMover:
    """Sends items of `memory` to decode ranks that asked for them.

    Listens on two ports of `host`: control (ZeroMQ) and data (TCP); `first_port` and the one after it, or any free two
    for 0. Raises LocalError where they are taken, ConfigError where others could reach them without keys, or where keys
    do not fit. Methods may be called from any thread.

    links: as configured, by the site they lead to. report: called with the state of every link, from a thread of the
    mover, every `link_sample_interval_s`. codecs: how full-attention KVCache goes to which site; `config.codec` to all
    where left out. site: this rank's, told to decode ranks.
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
        links: Mapping[str, LinkConfig] | None = None,
        report: Report | None = None,
        codecs: CodecChoice | None = None,
        site: str = "",
    ) -> None:
        self.layout = layout
        self._codecs = codecs or CodecChoice(config.codec)
        self._memory = memory
        self._config = config
        self._clock = clock
        self._lock = threading.Lock()
        self._rooms = Rooms(clock, config.waiting_timeout_s)
        self._sessions: dict[bytes, SendSession] = {}
        self._tokens: dict[bytes, SendSession] = {}
        self._farewells: dict[bytes, str] = {}
        """Why sessions ended whose decode ranks have yet to be told."""
        self._instance = secrets.token_bytes(16)
        self._counters = LinkCounters()
        self._closing = False
        self._refusals = RefusalLog(logger, clock)
        self._last_expiry_s = clock.now_s()
        self._site = site
        self._configured_links = links or {}
        self._buffers = kernel_buffers("send")
        check_links(self._configured_links, config, self._buffers)
        address = resolve(host)
        self.security = load_security(config)
        self.security.may_listen("the KVCache mover", address, config)
        listener = data_tcp.listen(address, first_port + 1 if first_port else 0, config)
        self.data_port: int = listener.getsockname()[1]
        self._acceptor = Acceptor(listener, clock, config.handshake_timeout_s, self, self.security)
        self._data = DataSender(config, clock, self._lock, lose=self._lose, abort=self.abort, acceptor=self._acceptor)
        self.links = LinkMonitor(config, clock, links=self._configured_links, pool_bytes=memory.nbytes, report=report)
        self._loop = ZmqLoop("prfaas-send-control", clock, self.security, config.control_messages_per_s)
        try:
            self._control = self._loop.socket(zmq.ROUTER, address)
            self._control.setsockopt(zmq.ROUTER_HANDOVER, 1)
            self._control.bind(endpoint(address, first_port))
        except zmq.ZMQError as error:
            self._acceptor.stop()
            self._loop.stop()
            raise LocalError(
                f"mover control port {first_port} on {host} cannot be used: {error}. "
                "Set mover_port to a free range, or 0."
            ) from None
        bound = self._control.getsockopt_string(zmq.LAST_ENDPOINT)
        self.control_port = int(bound.rpartition(":")[2])
        self._loop.add(self._control, self._receive)
        self._loop.on_client_loss(self._control, self._control_lost)
        self._loop.on_cut(self._control, self._client_cut)
        self._loop.on_list_change(self._list_changed)
        self._loop.every(min(config.heartbeat_interval_s, TICK_S), self._expire)
        self._loop.every(config.link_sample_interval_s, self._look_at_links)

    def start(self) -> None:
        """Begin to listen."""
        self._loop.start()
        self._acceptor.start()

    def close(self, reason: str = "the prefill server stopped") -> None:
        """Fail every transfer, tell the decode ranks, end all threads, free the ports. Idempotent."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            transfers = self._rooms.all()
        for transfer in transfers:
            self.abort(transfer, reason)
        self._loop.flush()
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            self._lose(session, reason)
        self._loop.stop(linger_ms=FAREWELL_MS)
        self._data.join(10.0)
        self._acceptor.stop()

    # --- what the sender calls ------------------------------------------------------------------------------------

    def transfer(self, room: int, share: int = 0) -> OutgoingTransfer:
        """The transfer of a new request; decode may have spoken of it already. Requests of one room have one prompt
        (parallel sampling), and are paired as they come. `share`: see `view`. Raises LocalError for too many."""
        with self._lock:
            return self._rooms.open(room, share)

    def view(self, transfer: OutgoingTransfer) -> SessionView | None:
        """What of this rank's memory goes to the decode rank that has asked for the request; None before. Of `shares`
        decode ranks that this rank serves, each has a transfer of its own, of the share 0, 1, ..."""
        with self._lock:
            session = self._rooms.home(transfer)
            return session.view if session is not None else None

    def send(
        self,
        transfer: OutgoingTransfer,
        component: int,
        first_item: int,
        indices: Indices,
        ready: Callable[[], None] = at_hand,
        *,
        buffers: Sequence[int] | None = None,
        awaited: bool = False,
    ) -> Indices:
        """Put items `first_item`... of a component on their way, those in `buffers` only where given (the layers that
        are computed); they lie at `indices`. `ready` is called before the memory is read, and may wait for a device.

        Returns at once, with the slots as they will be read: who moves an item meanwhile writes its new slot there,
        under the transfer's lock. A few bytes that are at hand leave before, from the calling thread, where a
        connection is idle. awaited: the caller calls `transfer.wait_acknowledged` next, from the same thread, which is
        sooner then. Raises LocalError for slots that do not exist."""
        with self._lock:
            session = self._rooms.home(transfer)
        memory = self._memory if session is None else session.view.memory
        items = memory.checked(component, indices)
        layout = self.layout if session is None else session.view.layout
        item_bytes = layout.components[component].item_bytes
        chunk_bytes = self._chunk_bytes(session, max(item_bytes, default=0))
        which = range(len(item_bytes)) if buffers is None else buffers
        spans = list(cut(component, item_bytes, first_item, len(items), chunk_bytes, which))
        with transfer.lock:
            queued = transfer.queue(component, first_item, len(items), len(spans), which, len(item_bytes))
            nbytes = sum(span.length for span in spans)
            if queued and session is not None:
                transfer.queued_bytes += nbytes
        if not queued or session is None:
            self._report(transfer)
            return items
        tasks = [Task(transfer, span, items, first_item, ready) for span in spans]
        small = 0 < nbytes <= SMALL_BYTES and ready is at_hand and session.codec.name == RAW
        if small and self._data.send_at_once(session, tasks, awaited=awaited):
            return items
        expected = transfer.expected
        remaining_bytes = layout.request_bytes(expected.counts) - transfer.bytes if expected is not None else 0
        session.dispatch.put(transfer, tasks, remaining_bytes, self._clock.now_s())
        return items

    def _chunk_bytes(self, session: SendSession | None, item_bytes: int) -> int:
        """How long chunks to a decode rank may be: less over a slow link, but an item where a chunk can hold one."""
        chunk_bytes = paced_chunk_bytes(self._config.chunk_bytes, self._config.rate_limit_mbps)
        if session is None:
            return chunk_bytes
        chunk_bytes = min(chunk_bytes, session.hello.chunk_bytes)
        link = self.links.figures(session.hello.site)
        if link is None:
            return chunk_bytes
        at_once = paced_chunk_bytes(chunk_bytes, link.capacity_bytes_per_s * 8 / 1e6)
        return max(at_once, min(item_bytes, chunk_bytes))

    def finish(self, transfer: OutgoingTransfer) -> None:
        """Nothing more will be sent for this request. Ends it where decode expects more items than were sent."""
        with transfer.lock:
            transfer.finish()
        self._report(transfer)

    def abort(self, transfer: OutgoingTransfer, reason: str) -> None:
        """End a transfer and tell decode why. From here on its pages are not read any more. Idempotent."""
        with transfer.lock:
            transfer.fail(reason)
        self._report(transfer)

    def release(self, transfer: OutgoingTransfer) -> None:
        """Forget a request; ends it first where it is still live. Idempotent."""
        self.abort(transfer, "the request ended on the prefill side")
        with self._lock:
            session = self._rooms.forget(transfer)
            if session is not None:
                self._counters.forgotten(session, transfer)
        if session is not None:
            session.dispatch.drop(transfer)

    def counts(self, site: str) -> LinkCounts:
        """What went to a site so far."""
        with self._lock:
            return self._counters.of(site, self._sessions.values())

    # --- control --------------------------------------------------------------------------------------------------

    def _reply(self, identity: bytes, message: Message) -> None:
        """Say what needs no delivery, from within the loop; dropped where the peer is gone or does not read."""
        session = self._sessions.get(identity)
        body = encode(message)
        envelope = session.mailbox.unnumbered(body) if session is not None else seal(body)
        self._control.send_multipart([identity, envelope], zmq.NOBLOCK)

    def _refuse(self, session: SendSession, why: str) -> None:
        """The session is over; another of the same name may have taken its place."""
        with self._lock:
            self._farewells.pop(session.identity, None)
        if session.identity not in self._sessions:
            self._reply(session.identity, Refuse(reason_text(why)))

    def _say(self, session: SendSession, message: Message) -> None:
        """Say what has to arrive, from within the loop."""
        if session.closed:
            return
        try:
            envelope = session.mailbox.post(encode(message), self._clock.now_s())
        except LocalError as error:
            self._lose(session, str(error))
            return
        self._control.send_multipart([session.identity, envelope], zmq.NOBLOCK)

    def _report(self, transfer: OutgoingTransfer) -> None:
        """Tell decode of a failure that it does not know of yet."""
        with transfer.lock:
            expected = transfer.expected
            if transfer.state is not State.FAILED or transfer.peer_knows or expected is None:
                return
            transfer.peer_knows = True
            message = Failed(expected.transfer_id, transfer.room, reason_text(transfer.reason))
        with self._lock:
            session = self._rooms.home(transfer)
        if session is not None:
            self._loop.call(lambda: self._say(session, message))

    def _receive(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            self._refusals.warn(f"control message of {len(frames)} frames dropped, expected 2")
            return
        identity = frames[0].bytes
        session = self._sessions.get(identity)
        now_s = self._clock.now_s()
        try:
            number, acknowledged, body = unseal(frames[1].bytes)
            if session is not None and not session.mailbox.accept(number, acknowledged, now_s):
                return
            message = decode_to_prefill(body)
        except ChecksumError as error:
            self._refusals.warn(f"{session or 'a peer without a session'}: {error}")
            return  # it comes again
        except ProtocolError as error:
            self._refusals.warn(f"{session or 'a peer without a session'}: {error}")
            self._reply(identity, Refuse(reason_text(str(error))))
            if session is not None:
                self._lose(session, str(error))
            return
        if session is not None:
            session.health.heard(now_s)
        if isinstance(message, Hello):
            self._hello(identity, message, self._proof(frames[1]))
        else:
            self._act(identity, session, message)
        session = self._sessions.get(identity)
        if session is not None:
            self._came_over(session, int(frames[1].get(zmq.SRCFD)), now_s)

    def _came_over(self, session: SendSession, descriptor: int, now_s: float) -> None:
        """A message came over a control connection, which may have ended since."""
        if descriptor == session.descriptor and session.health.control_stands:
            return
        session.descriptor = descriptor
        stands = self._loop.connected(self._control, descriptor)
        with self._lock:
            if stands:
                session.health.control_found(now_s)
            else:
                session.health.control_lost(now_s)

    def _control_lost(self, descriptor: int) -> None:
        """A control connection has ended. Its decode rank may dial again."""
        with self._lock:
            for session in self._sessions.values():
                if session.descriptor == descriptor:
                    session.health.control_lost(self._clock.now_s())

    def _act(self, identity: bytes, session: SendSession | None, message: ToPrefill) -> None:
        if isinstance(message, Abort):
            self._aborted(session, message)
        elif session is None:
            with self._lock:
                why = self._farewells.get(identity)
            self._reply(identity, Refuse(reason_text(why)) if why else Unknown(self._instance))
        elif isinstance(message, Expect):
            self._expect(session, message)
        elif isinstance(message, Done):
            self._done(session, message)
        elif isinstance(message, Bye):
            self._lose(session, f"decode ended it: {message.reason}")
        elif isinstance(message, Ping):
            self._reply(identity, Pong())

    def _proof(self, frame: zmq.Frame) -> tuple[str, str]:
        """The site that the sender of a message has proved to be of, and its key; empty without keys."""
        if self.security.keys is None:
            return "", ""
        return str(frame.get("User-Id")), str(frame.get(KEY_PROPERTY))

    def _hello(self, identity: bytes, hello: Hello, proof: tuple[str, str]) -> None:
        """A decode rank opens a session."""
        site, curve_key = proof
        asked = hello
        tuned = self._tuned(site or hello.site, hello)
        hello = msgspec.structs.replace(hello, connections=tuned.connections)
        who = f"{hello.site}/{hello.server}"
        with self._lock:
            sessions = len(self._sessions)
            connections = sum(session.hello.connections for session in self._sessions.values())
            own = sum(session.site == site for session in self._sessions.values())
        reason = refusal(
            self.layout, hello, sessions=sessions, connections=connections, proved_site=site, site_sessions=own
        )
        if self._closing:
            reason = "the prefill server is stopping"
        if reason:
            self._refusals.warn(f"decode {who} refused: {reason}", logging.ERROR)
            self._reply(identity, Refuse(reason_text(reason)))
            return
        known = self._sessions.get(identity)
        if known is not None and known.asked == asked:
            self._reply(identity, self._welcome(known))  # the first one was lost
            return
        for old in self._replaced(identity, hello):
            restarted = old.hello.instance != hello.instance
            self._lose(old, "its process has restarted" if restarted else "the decode server opened a new session")
        view = prefill_view(self.layout, self._memory, hello.layout)
        codec = self._codec(who, hello, site or hello.site, view.layout)
        session = SendSession(identity, hello, tuned, self._clock.now_s(), view, site, codec, curve_key, asked)
        with self._lock:
            self._sessions[identity] = session
            self._tokens[session.token] = session
        logger.info("prfaas: decode %s connects with %d data connections", who, hello.connections)
        self._reply(identity, self._welcome(session))

    def _welcome(self, session: SendSession) -> Welcome:
        return Welcome(
            session.token,
            self.data_port,
            self._instance,
            session.codec.name,
            session.hello.connections,
            self.security.site or self._site,
        )

    def _tuned(self, site: str, hello: Hello) -> TransportConfig:
        """As it holds for the link to a decode rank's site. Where its entry names no number of connections, there are
        as many as decode asks for, or more if this end needs them."""
        link = self._configured_links.get(site)
        tuned = for_link(self._config, link, self._buffers)
        if link is None or not link.connections:
            needed = tuned.connections if tuned.connections > self._config.connections else 1
            tuned = msgspec.structs.replace(tuned, connections=max(hello.connections, needed))
        return tuned

    def _codec(self, who: str, hello: Hello, site: str, layout: Layout) -> SessionCodec:
        """How full-attention KVCache goes to a decode rank: as its site is to get it, where both ends can."""
        wanted = self._codecs.of(site)
        if wanted == RAW:
            return SessionCodec()
        why = obstacle(wanted, layout, hello.codecs, min(self._config.chunk_bytes, hello.chunk_bytes))
        if why:
            logger.warning("prfaas: KVCache to decode %s is not encoded as %s: %s", who, wanted, why)
            return SessionCodec()
        logger.info("prfaas: full-attention KVCache to decode %s is encoded as %s", who, wanted)
        return SessionCodec(wanted, layout)

    def _client_cut(self, doomed: Doomed) -> bool:
        """A decode rank's control connection is about to be cut: its session ends with it."""
        session = self._sessions.get(doomed.identity)
        if session is not None:
            self._lose(session, doomed.reason)
        return session is not None

    def _list_changed(self, watch: Watch) -> None:
        """End what stands of sites, keys and certificates that are not let in any more."""
        with self._lock:
            sessions = [(session, list(session.links.values())) for session in self._sessions.values()]
        for session, links in sessions:
            if not watch.has_key(session.site, session.curve_key):
                self._lose(session, f"its key {session.curve_key} is not in peers.toml any more")
                continue
            for link in links:
                certificate = link.connection.certificate
                if not watch.has_certificate(session.site, certificate):
                    self._data.give_up(session, link, f"its certificate {certificate} is not in peers.toml any more")

    def _replaced(self, identity: bytes, hello: Hello) -> list[SendSession]:
        """The sessions that a new one takes the place of: of the same rank of the same server, where it has a name."""

        def same(other: Hello) -> bool:
            return bool(hello.server) and (other.site, other.server, other.rank) == (
                hello.site,
                hello.server,
                hello.rank,
            )

        return [s for i, s in self._sessions.items() if i == identity or same(s.hello)]

    def _expect(self, session: SendSession, message: Expect) -> None:
        components = len(self.layout.components)
        if message.transfer_id in session.transfers:
            self._lose(session, f"it used transfer id {message.transfer_id} twice")
            return
        reason = ""
        if len(message.counts) != components:
            reason = f"{len(message.counts)} components expected by decode, prefill has {components}"
        elif len(session.transfers) >= MAX_SESSION_TRANSFERS:
            reason = f"decode has {MAX_SESSION_TRANSFERS} requests open, no more are allowed"
        elif self._closing:
            reason = "the prefill server is stopping"
        else:
            with self._lock:
                if session.closed:
                    return
                transfer = self._rooms.asked_for(message.room, session, message.transfer_id)
            with transfer.lock:
                if transfer.expect(message):
                    link = self.links.admission(session.hello.site)
                    transfer.goes_over(link, session.view.layout.request_bytes(message.counts))
                    transfer.codec = session.codec.name
                else:
                    reason = transfer.reason
        if reason:
            self._say(session, Failed(message.transfer_id, message.room, reason_text(reason)))

    def _done(self, session: SendSession, message: Done) -> None:
        transfer = session.transfers.get(message.transfer_id)
        if transfer is None or transfer.room != message.room:
            return  # it was released here, which tells decode
        with transfer.lock:
            transfer.done()
        self._report(transfer)

    def _aborted(self, session: SendSession | None, message: Abort) -> None:
        reason = f"decode ended the request: {message.reason}"
        with self._lock:
            transfer = self._rooms.aborted(message.room, session, message.transfer_id, reason)
        if transfer is not None:
            with transfer.lock:
                transfer.fail(reason)
                transfer.peer_knows = True

    def _look_at_links(self) -> None:
        with self._lock:
            traffic = [
                Traffic(
                    session.hello.site,
                    [link.connection for link in session.links.values()],
                    sum(t.queued_bytes - t.acknowledged_bytes for t in session.transfers.values() if t.live),
                )
                for session in self._sessions.values()
            ]
        self.links.look(traffic)

    def _expire(self) -> None:
        config = self._config
        now_s = self._clock.now_s()
        stalled_s, self._last_expiry_s = now_s - self._last_expiry_s, now_s
        if stalled_s > config.heartbeat_timeout_s / 2:
            return  # it was this process that did not run: what peers sent meanwhile has yet to be read
        with self._lock:
            sessions = list(self._sessions.values())
            late = self._rooms.expire()
        for session in sessions:
            with self._lock:
                why = session.health.verdict(now_s)
                silent = not why and session.health.silent(now_s)
                opening = session.health.contact is Contact.OPENING
            if not why and opening and now_s - session.opened_s > config.handshake_timeout_s:
                why = f"no data connections within {config.handshake_timeout_s:g} s"
            elif not why and opening and now_s - session.health.heard_s > config.heartbeat_timeout_s:
                why = f"silent for {now_s - session.health.heard_s:.1f} s"
            if why:
                self._lose(session, why)
                continue
            if silent:
                self._data.renew_all(session, f"silent for {config.heartbeat_timeout_s:g} s")
            for index in self._data.stalled(session):
                self._say(session, Redial(index))
            for envelope in session.mailbox.resend(now_s):
                self._control.send_multipart([session.identity, envelope], zmq.NOBLOCK)
            if session.mailbox.owing:
                self._reply(session.identity, Pong())
        for transfer, home, transfer_id in late:
            reason = f"prefill did not get the request within {config.waiting_timeout_s:g} s"
            with transfer.lock:
                ended = transfer.fail(reason)
            if ended:
                self._say(home, Failed(transfer_id, transfer.room, reason))

    def _lose(self, session: SendSession, reason: str) -> None:
        """Close a session: its transfers fail, its connections close. Idempotent; from any thread."""
        with self._lock:
            if session.closed:
                return
            session.closed = True
            if self._sessions.get(session.identity) is session:
                del self._sessions[session.identity]
            self._tokens.pop(session.token, None)
            self._counters.lost(session)
            why = f"connection to {session} lost: {reason}"
            self._farewells[session.identity] = why
            transfers = self._rooms.lost(session, why)
            connections = [link.connection for link in session.links.values()]
            session.health.lose()
        for transfer in transfers:
            with transfer.lock:
                transfer.fail(why)
                transfer.peer_knows = True
        session.dispatch.close()
        for connection in connections:
            connection.cut()
        self._loop.call(lambda: self._refuse(session, why))
        if not self._closing:
            logger.warning("prfaas: session with %s ended: %s", session, reason)

    # --- data -----------------------------------------------------------------------------------------------------

    def admit(self, preface: Preface, connection: Connection) -> Callable[[], bool]:
        """A data connection has shown its token: it gets a thread. Raises PrfaasError. Called by the acceptor."""
        with self._lock:
            session = self._tokens.get(preface.token)
            if session is None:
                raise ProtocolError("its token belongs to no session")
            if connection.site != session.site:
                raise ProtocolError(f"it is of site {connection.site}, the session with its token of {session.site}")
            return self._data.add(session, preface.index, connection)
