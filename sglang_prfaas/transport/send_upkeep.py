"""What a prefill rank does by the clock: it ends what is late or silent, and looks at its links."""

from __future__ import annotations

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.transport.health import Contact
from sglang_prfaas.transport.link_monitor import LinkMonitor, Traffic
from sglang_prfaas.transport.messages import Failed, Pong, Redial
from sglang_prfaas.transport.security.peers import Watch
from sglang_prfaas.transport.send_control import SendControl
from sglang_prfaas.transport.send_data import DataSender
from sglang_prfaas.transport.send_session import SendSession
from sglang_prfaas.transport.send_table import SendTable


class SendUpkeep:
    """Belongs to the control loop: it calls `expire` and `look_at_links` again and again, and `list_changed` when the
    list of sites has changed."""

    def __init__(
        self,
        config: TransportConfig,
        clock: Clock,
        *,
        table: SendTable,
        control: SendControl,
        data: DataSender,
        links: LinkMonitor,
    ) -> None:
        self._config = config
        self._clock = clock
        self._table = table
        self._control = control
        self._data = data
        self._links = links
        self._last_expiry_s = clock.now_s()

    def expire(self) -> None:
        """End sessions and requests that have waited too long, have lost connections dialled again, and say again what
        has not arrived."""
        config = self._config
        now_s = self._clock.now_s()
        stalled_s, self._last_expiry_s = now_s - self._last_expiry_s, now_s
        if stalled_s > config.heartbeat_timeout_s / 2:
            return  # it was this process that did not run: what peers sent meanwhile has yet to be read
        sessions, late = self._table.standing(), self._table.expire()
        for session in sessions:
            self._keep(session, now_s)
        for transfer, home, transfer_id in late:
            reason = f"prefill did not get the request within {config.waiting_timeout_s:g} s"
            with transfer.lock:
                ended = transfer.fail(reason)
            if ended:
                self._control.say(home, Failed(transfer_id, transfer.room, reason))

    def _keep(self, session: SendSession, now_s: float) -> None:
        config = self._config
        with self._table.lock:
            why = session.health.verdict(now_s)
            silent = not why and session.health.silent(now_s)
            opening = session.health.contact is Contact.OPENING
        if not why and opening and now_s - session.opened_s > config.handshake_timeout_s:
            why = f"no data connections within {config.handshake_timeout_s:g} s"
        elif not why and opening and now_s - session.health.heard_s > config.heartbeat_timeout_s:
            why = f"silent for {now_s - session.health.heard_s:.1f} s"
        if why:
            self._control.lose(session, why)
            return
        if silent:
            self._data.renew_all(session, f"silent for {config.heartbeat_timeout_s:g} s")
        for index in self._data.stalled(session):
            self._control.say(session, Redial(index))
        self._control.say_again(session, now_s)
        if session.mailbox.owing:
            self._control.reply(session.identity, Pong())

    def look_at_links(self) -> None:
        """Sample what goes to each decode rank."""
        with self._table.lock:
            traffic = [
                Traffic(
                    session.hello.site,
                    [link.connection for link in session.links.values()],
                    sum(t.queued_bytes - t.acknowledged_bytes for t in session.transfers.values() if t.live),
                )
                for session in self._table.sessions.values()
            ]
        self._links.look(traffic)

    def list_changed(self, watch: Watch) -> None:
        """End what stands of sites, keys and certificates that are not let in any more."""
        with self._table.lock:
            sessions = [(session, list(session.links.values())) for session in self._table.sessions.values()]
        for session, links in sessions:
            if not watch.has_key(session.site, session.curve_key):
                self._control.lose(session, f"its key {session.curve_key} is not in peers.toml any more")
                continue
            for link in links:
                certificate = link.connection.certificate
                if not watch.has_certificate(session.site, certificate):
                    self._data.give_up(session, link, f"its certificate {certificate} is not in peers.toml any more")
