"""What a decode rank does by the clock: it ends sessions that are late or gone, and keeps the others."""

from __future__ import annotations

import logging

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.health import Contact
from sglang_prfaas.transport.lookup import DirectoryClient
from sglang_prfaas.transport.messages import Ping
from sglang_prfaas.transport.receive_control import ReceiveControl
from sglang_prfaas.transport.receive_session import PeerSession
from sglang_prfaas.transport.receive_table import ReceiveTable
from sglang_prfaas.transport.security.peers import Watch

logger = logging.getLogger(__name__)


class ReceiveUpkeep:
    """Belongs to the control loop: it calls `tick` again and again, and `list_changed` when the list of sites has
    changed."""

    def __init__(
        self,
        config: TransportConfig,
        clock: Clock,
        *,
        table: ReceiveTable,
        control: ReceiveControl,
        directories: DirectoryClient,
    ) -> None:
        self._config = config
        self._clock = clock
        self._table = table
        self._control = control
        self._directories = directories
        self._last_ping_s = self._last_tick_s = clock.now_s()

    def tick(self) -> None:
        """End what is late, make connections anew that are silent, ping, and say again what has not arrived."""
        self._directories.tick()
        config = self._config
        now_s = self._clock.now_s()
        stalled_s, self._last_tick_s = now_s - self._last_tick_s, now_s
        stalled = stalled_s > config.heartbeat_timeout_s / 2
        ping = now_s - self._last_ping_s >= config.heartbeat_interval_s
        if ping:
            self._last_ping_s = now_s
        for session in self._table.standing():
            if not session.up and session.deadline.expired:
                self._control.lose(session, f"no session within {config.handshake_timeout_s:g} s")
                continue
            if not stalled:
                if not self._control.judge(session):
                    continue
                self._renew_if_silent(session, now_s)
            if session.control is None or not session.connected:
                continue
            self._control.say_again(session, now_s)
            if ping or session.mailbox.owing or session.health.contact is Contact.SUSPENDED:
                self._control.mention(session, Ping())

    def list_changed(self, watch: Watch) -> None:
        """End what stands of sites, keys and certificates that are not let in any more."""
        for session in self._table.standing():
            site, key = session.server.site, session.server.public.decode()
            if site and not watch.has_key(site, key):
                self._control.lose(session, f"its key {key} is not in peers.toml any more")
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
