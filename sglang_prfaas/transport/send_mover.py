"""The mover of a prefill rank: what its callers use, and the parts that it is made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import zmq

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.core.link_counts import LinkCounts
from sglang_prfaas.errors import LocalError, ProtocolError
from sglang_prfaas.transport import data_tcp
from sglang_prfaas.transport.acceptor import Acceptor
from sglang_prfaas.transport.addresses import endpoint, resolve
from sglang_prfaas.transport.codec.session import RAW, CodecChoice
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.framing import Preface
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.link_monitor import LinkMonitor, Report
from sglang_prfaas.transport.link_tuning import LinkTuning, kernel_buffers
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.memory import Indices, RankMemory
from sglang_prfaas.transport.outbox import Task, at_hand
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer
from sglang_prfaas.transport.pacing import paced_chunk_bytes
from sglang_prfaas.transport.part_memory import SessionView
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.security.refusals import RefusalLog
from sglang_prfaas.transport.send_control import SendControl
from sglang_prfaas.transport.send_data import SMALL_BYTES, DataSender
from sglang_prfaas.transport.send_handler import SendHandler
from sglang_prfaas.transport.send_handshake import Handshake
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.send_table import SendTable
from sglang_prfaas.transport.send_upkeep import SendUpkeep
from sglang_prfaas.transport.streams import cut

logger = logging.getLogger(__name__)

TICK_S = 0.25
FAREWELL_MS = 1000
"""How long the last messages may take to leave when the mover closes."""


class SendMover:
    """Sends items of `memory` to decode ranks that asked for them.

    Listens on two ports of `host`: control (ZeroMQ) and data (TCP); `first_port` and the one after it, or any free two
    for 0. Raises LocalError where they are taken, ConfigError where others could reach them without keys, or where keys
    do not fit. Methods may be called from any thread.

    Its threads: the control loop, in which `SendHandler`, `Handshake` and `SendUpkeep` run; the acceptor's, which calls
    `admit` and reads receipts; one for each data connection (`DataSender`). The lock of `SendTable` guards who is
    served, that of each transfer its state and slots; neither is taken under the other.

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
        self._memory = memory
        self._config = config
        self._clock = clock
        self._table = SendTable(clock, config.waiting_timeout_s)
        configured_links = links or {}
        tuning = LinkTuning(config, configured_links, kernel_buffers("send"))
        address = resolve(host)
        self.security = load_security(config)
        self.security.may_listen("the KVCache mover", address, config)
        listener = data_tcp.listen(address, first_port + 1 if first_port else 0, config)
        self.data_port: int = listener.getsockname()[1]
        self._acceptor = Acceptor(listener, clock, config.handshake_timeout_s, self, self.security)
        self.links = LinkMonitor(config, clock, links=configured_links, pool_bytes=memory.nbytes, report=report)
        self._loop = ZmqLoop("prfaas-send-control", clock, self.security, config.control_messages_per_s)
        try:
            sock = self._loop.socket(zmq.ROUTER, address)
            sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
            sock.bind(endpoint(address, first_port))
        except zmq.ZMQError as error:
            self._acceptor.stop()
            self._loop.stop()
            raise LocalError(
                f"mover control port {first_port} on {host} cannot be used: {error}. "
                "Set mover_port to a free range, or 0."
            ) from None
        self.control_port = int(sock.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._control = SendControl(self._table, clock, self._loop, sock)
        self._data = DataSender(
            config, clock, self._table.lock, lose=self._control.lose, abort=self._control.abort, acceptor=self._acceptor
        )
        refusals = RefusalLog(logger, clock)
        self._handshake = Handshake(
            layout,
            memory,
            config,
            clock,
            table=self._table,
            control=self._control,
            tuning=tuning,
            codecs=codecs or CodecChoice(config.codec),
            security=self.security,
            refusals=refusals,
            data_port=self.data_port,
            site=site,
        )
        self._handler = SendHandler(
            len(layout.components),
            clock,
            table=self._table,
            control=self._control,
            handshake=self._handshake,
            links=self.links,
            refusals=refusals,
        )
        upkeep = SendUpkeep(config, clock, table=self._table, control=self._control, data=self._data, links=self.links)
        self._loop.add(sock, self._handler.receive)
        self._loop.on_client_loss(sock, self._handler.control_lost)
        self._loop.on_cut(sock, self._handler.client_cut)
        self._loop.on_list_change(upkeep.list_changed)
        self._loop.every(min(config.heartbeat_interval_s, TICK_S), upkeep.expire)
        self._loop.every(config.link_sample_interval_s, upkeep.look_at_links)

    def start(self) -> None:
        """Begin to listen."""
        self._loop.start()
        self._acceptor.start()

    def close(self, reason: str = "the prefill server stopped") -> None:
        """Fail every transfer, tell the decode ranks, end all threads, free the ports. Idempotent."""
        transfers = self._table.close()
        if transfers is None:
            return
        for transfer in transfers:
            self.abort(transfer, reason)
        self._loop.flush()
        for session in self._table.standing():
            self._control.lose(session, reason)
        self._loop.stop(linger_ms=FAREWELL_MS)
        self._data.join(10.0)
        self._acceptor.stop()

    # --- what the sender calls ------------------------------------------------------------------------------------

    def transfer(self, room: int, share: int = 0) -> OutgoingTransfer:
        """The transfer of a new request; decode may have spoken of it already. Requests of one room have one prompt
        (parallel sampling), and are paired as they come. `share`: see `view`. Raises LocalError for too many."""
        return self._table.open(room, share)

    def view(self, transfer: OutgoingTransfer) -> SessionView | None:
        """What of this rank's memory goes to the decode rank that has asked for the request; None before. Of `shares`
        decode ranks that this rank serves, each has a transfer of its own, of the share 0, 1, ..."""
        session = self._table.home(transfer)
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
        session = self._table.home(transfer)
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
            self._control.report(transfer)
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
        self._control.report(transfer)

    def abort(self, transfer: OutgoingTransfer, reason: str) -> None:
        """End a transfer and tell decode why. From here on its pages are not read any more. Idempotent."""
        self._control.abort(transfer, reason)

    def release(self, transfer: OutgoingTransfer) -> None:
        """Forget a request; ends it first where it is still live. Idempotent."""
        self.abort(transfer, "the request ended on the prefill side")
        session = self._table.forget(transfer)
        if session is not None:
            session.dispatch.drop(transfer)

    def counts(self, site: str) -> LinkCounts:
        """What went to a site so far."""
        return self._table.counts(site)

    # --- data -----------------------------------------------------------------------------------------------------

    def admit(self, preface: Preface, connection: Connection) -> Callable[[], bool]:
        """A data connection has shown its token: it gets a thread. Raises PrfaasError. Called by the acceptor."""
        with self._table.lock:
            session = self._table.of_token(preface.token)
            if session is None:
                raise ProtocolError("its token belongs to no session")
            if connection.site != session.site:
                raise ProtocolError(f"it is of site {connection.site}, the session with its token of {session.site}")
            return self._data.add(session, preface.index, connection)
