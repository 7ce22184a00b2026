"""The mover of a decode rank: what its callers use, and the parts that it is made of."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence

from sglang_prfaas.clock import Clock, Deadline
from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import LocalError, PeerGoneError
from sglang_prfaas.transport.codec.session import offered
from sglang_prfaas.transport.incoming_transfer import IncomingTransfer
from sglang_prfaas.transport.layout import Layout
from sglang_prfaas.transport.link_tuning import LinkTuning, kernel_buffers
from sglang_prfaas.transport.lookup import DirectoryClient
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.memory import Indices, RankMemory
from sglang_prfaas.transport.messages import PROTOCOL_VERSION, Abort, Directory, Done, Expect, Hello, reason_text
from sglang_prfaas.transport.part_memory import PrefillRank, decode_view
from sglang_prfaas.transport.receive_control import FAREWELL_MS, ReceiveControl
from sglang_prfaas.transport.receive_data import DataReceiver
from sglang_prfaas.transport.receive_dialer import ControlDialer
from sglang_prfaas.transport.receive_handler import ReceiveHandler
from sglang_prfaas.transport.receive_session import Incoming, PeerSession
from sglang_prfaas.transport.receive_table import ReceiveTable
from sglang_prfaas.transport.receive_upkeep import ReceiveUpkeep
from sglang_prfaas.transport.resolver import resolve_in_background
from sglang_prfaas.transport.security import ServerKeys, load_security

__all__ = ["Incoming", "PeerSession", "ReceiveMover"]

TICK_S = 0.25


class ReceiveMover:
    """Receives items into `memory` from prefill ranks. Dials; listens on nothing. Safe to call from any thread.

    Its threads: the control loop, in which `ReceiveHandler`, `ControlDialer` and `ReceiveUpkeep` run; one for each data
    connection (`DataReceiver`). The lock of `ReceiveTable` guards which sessions there are, each session's what is in
    it, each transfer's its state and slots.

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
        self._memory = memory
        self._config = config
        self._clock = clock
        self._ids = itertools.count(1)
        self._table = ReceiveTable()
        tuning = LinkTuning(config, links or {}, kernel_buffers("receive"))
        security = load_security(config)
        keys = ServerKeys(security.server_keys)
        self._loop = ZmqLoop("prfaas-receive-control", clock, security)
        self._directories = DirectoryClient(self._loop, clock, config.handshake_timeout_s, keys)
        self._control = ReceiveControl(self._table, clock, self._loop, self._directories)
        self._data = DataReceiver(config, security, clock, lose=self._control.lose, complete=self._tell_done)
        self._dialer = ControlDialer(
            Hello(
                PROTOCOL_VERSION,
                site,
                server,
                layout,
                config.connections,
                config.chunk_bytes,
                secrets.token_bytes(16),
                rank,
                offered(config.accept_codecs),
            ),
            config,
            clock,
            self._loop,
            control=self._control,
            handler=ReceiveHandler(config, clock, control=self._control, data=self._data, tuning=tuning),
            tuning=tuning,
            keys=keys,
        )
        upkeep = ReceiveUpkeep(config, clock, table=self._table, control=self._control, directories=self._directories)
        self._loop.every(min(config.heartbeat_interval_s, TICK_S), upkeep.tick)
        self._loop.on_list_change(upkeep.list_changed)

    def start(self) -> None:
        self._loop.start()

    def close(self, reason: str = "the decode server stopped") -> None:
        """Fail every transfer, tell the prefill ranks, end all threads. Idempotent."""
        sessions = self._table.close()
        if sessions is None:
            return
        for session in sessions:
            with session.lock:
                items = list(session.incoming.values())
            for item in items:
                self.abort(item, reason)
        self._loop.flush()
        for session in sessions:
            self._control.lose(session, reason)
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
        self._directories.forget(authority(host, port))

    # --- sessions -------------------------------------------------------------------------------------------------

    def session(
        self, address: str, host: str, control_port: int, room: int | None = None, rank: PrefillRank | None = None
    ) -> PeerSession:
        """The session with a prefill rank, opened where there is none. Look at its `up` and `failure`. Never waits.

        `address`: the bootstrap address it was found at, asked again once the session fails. `room`: the request that
        needs it; should the session fail before `leave`, the prefill rank is told that this request has ended. `rank`:
        None where it is as here."""

        def make() -> PeerSession:
            deadline = Deadline(self._clock, self._config.handshake_timeout_s)
            view = decode_view(self.layout, self._memory, rank or PrefillRank(self.layout.tp_size, self.layout.tp_rank))
            return PeerSession(address, host, control_port, deadline, self._config, self._clock.now_s(), view)

        session, new = self._table.enter(host, control_port, room, make)
        if new:
            resolve_in_background(
                host,
                found=lambda numeric: self._loop.call(lambda: self._dialer.open(session, numeric)),
                failed=lambda reason: self._control.lose(session, reason),
            )
        return session

    def leave(self, session: PeerSession, room: int) -> None:
        """The request of `room` does not need the session any more."""
        session.leave(room)

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
        self._control.say_soon(session, Expect(transfer.transfer_id, room, counts, cached_prefix_tokens))
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
        self._control.say_soon(session, Abort(room, reason_text(reason), transfer_id))

    def release(self, item: Incoming) -> None:
        """Forget a request; ends it first where it is still live. Late chunks of it are drained and dropped."""
        self.abort(item, "the request ended on the decode side")
        with item.session.lock:
            item.session.incoming.pop(item.transfer.transfer_id, None)

    def _tell_done(self, session: PeerSession, transfer: IncomingTransfer) -> None:
        self._control.say_soon(session, Done(transfer.transfer_id, transfer.room))
