"""The router's connections to agents with a reports port: subscribes, takes reports in, sends commands.

ZeroMQ in a thread of its own, with the keys of the router's site; the state (`reports`) belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import zmq
from msgspec import Struct

from sglang_prfaas.clock import Clock, Deadline, MonotonicClock
from sglang_prfaas.config.schema import ReportsConfig, RouterSite
from sglang_prfaas.config.security import beyond_this_machine
from sglang_prfaas.core.addresses import authority
from sglang_prfaas.errors import ConfigError, DeadlineError, LocalError, ProtocolError
from sglang_prfaas.monitor.cache_reports import CacheUpdate, ReadCache
from sglang_prfaas.monitor.reports import VERSION, Action, Answer, Command, Request, SiteLoads, SiteState, Subscribe
from sglang_prfaas.monitor.site_reports import SiteReports
from sglang_prfaas.monitor.wire import MAX_REPORT_BYTES, decode_report, encode
from sglang_prfaas.transport.addresses import endpoint
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.security import ServerKey, load_security
from sglang_prfaas.transport.security.curve import Loss

logger = logging.getLogger(__name__)

GRACE_S = 300.0
"""How long an answer may take over the deadline of a command: a change of role is also checked, and undone."""


class _Link(Struct):
    site: str
    host: str
    port: int
    turn: int = 0
    sock: zmq.Socket[bytes] | None = None
    said: str = ""


class _Pending(Struct):
    site: str
    command: Command
    deadline: Deadline
    answered: asyncio.Future[Answer]


class AgentLinks:
    """One connection to each agent with a `reports_port`. Methods belong to the event loop it was started in."""

    def __init__(
        self,
        sites: list[RouterSite],
        config: ReportsConfig,
        *,
        on_state: Callable[[SiteState], None] = lambda state: None,
        on_loads: Callable[[SiteLoads], None] = lambda loads: None,
        on_cache: Callable[[CacheUpdate], None] = lambda update: None,
        clock: Clock | None = None,
    ) -> None:
        """on_state, on_loads: called after `reports` has taken one in. on_cache: an answer to `read_cache`."""
        self._clock = clock or MonotonicClock()
        self.reports = SiteReports(self._clock, config.stale_after_s)
        """The newest of every site."""
        self._config = config
        self._links = {
            site.name: _Link(site.name, urlsplit(site.agent_url).hostname or "", site.reports_port)
            for site in sites
            if site.reports_port and site.agent_url
        }
        self._on_state = on_state
        self._on_loads = on_loads
        self._on_cache = on_cache
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._asyncio: asyncio.AbstractEventLoop | None = None
        self._loop: ZmqLoop | None = None
        self._pending: dict[str, _Pending] = {}

    def start(self) -> None:
        """Begin to dial. Raises ConfigError for keys that do not fit, and without keys for agents on other machines."""
        if not self._links:
            return
        self._security = load_security(self._config)
        for link in self._links.values():
            if self._security.keys is None and self._config.security != "off" and beyond_this_machine(link.host):
                raise ConfigError(
                    f"the agent of {link.site} at {link.host} is beyond this machine: set reports.keys_dir to this "
                    'site\'s keys, or, in a network that protects the traffic itself, reports.security = "off"'
                )
        self._asyncio = asyncio.get_running_loop()
        self._loop = ZmqLoop("prfaas-agents", self._clock, self._security)
        for link in self._links.values():
            self._dial(link)
        self._loop.every(self._config.heartbeat_interval_s, self._subscribe)
        self._loop.start()
        self._loop.call(self._subscribe)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites whose agents are dialled."""
        return tuple(self._links)

    def read_cache(self, site: str, request: ReadCache) -> None:
        """Ask a site's agent what its servers' caches hold. The answer may get lost: ask again."""
        if self._loop is not None:
            self._loop.call(lambda: self._send(self._links[site], request))

    def problem(self, site: str) -> str:
        """What is wrong with the connection to a site's agent, as far as it is known; empty while reports come."""
        link = self._links.get(site)
        return link.said if link is not None else "no reports_port"

    async def stop(self) -> None:
        """Close all connections; commands without an answer fail."""
        loop, self._loop = self._loop, None
        if loop is not None:
            await asyncio.to_thread(loop.stop)
        for pending in self._pending.values():
            pending.answered.cancel()

    async def command(self, site: str, action: Action, deadline_s: float) -> Answer:
        """Have a site's agent do something, and wait for its answer.

        Sent again until it is answered, over a new connection too; the agent does it once. Raises LocalError for a site
        without a reports port, DeadlineError where no answer comes."""
        if site not in self._links or self._loop is None:
            raise LocalError(f"there is no connection for commands to site {site}; set its reports_port")
        command = Command(id=secrets.token_hex(8), deadline_s=deadline_s, action=action)
        deadline = Deadline(self._clock, deadline_s)
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._pending[command.id] = _Pending(site, command, deadline, answered)
        self._loop.call(lambda: self._send(self._links[site], command))
        try:
            async with asyncio.timeout(deadline_s + GRACE_S):
                return await answered
        except TimeoutError:
            raise DeadlineError(f"no answer of the agent of {site} within {deadline_s + GRACE_S:g} s") from None
        finally:
            del self._pending[command.id]

    # --- in the ZeroMQ thread -----------------------------------------------------------------------------------------

    def _dial(self, link: _Link) -> None:
        assert self._loop is not None
        keys = self._security.site_keys(link.site)
        if not keys:
            self._say(link, f"peers.toml has no site {link.site}")
            return
        key = keys[link.turn % len(keys)]
        sock = self._loop.socket(zmq.DEALER, link.host, key)
        sock.setsockopt(zmq.MAXMSGSIZE, MAX_REPORT_BYTES)
        sock.connect(endpoint(link.host, link.port))
        link.sock = sock
        self._loop.add(sock, lambda frames: self._receive(link, frames))
        self._loop.on_loss(sock, lambda loss: self._lost(link, sock, key, loss), key)

    def _lost(self, link: _Link, sock: zmq.Socket[bytes], key: ServerKey, loss: Loss) -> None:
        """Say it once; where another key may be right, or the list of keys has changed, dial again with that."""
        self._say(link, loss.reason)
        if loss.refused and self._loop is not None and self._security.site_keys(link.site) != (key,):
            link.turn += 1
            link.sock = None
            self._loop.remove(sock)

    def _say(self, link: _Link, text: str) -> None:
        if link.said != text:
            logger.warning("reports of site %s at %s: %s", link.site, authority(link.host, link.port), text)
        link.said = text

    def _subscribe(self) -> None:
        if self._loop is None:
            return  # stopping
        for link in self._links.values():
            if link.sock is None:
                self._dial(link)
            self._send(link, Subscribe(router=self._name, version=VERSION))
        for pending in list(self._pending.values()):
            again = Command(
                id=pending.command.id, deadline_s=pending.deadline.remaining_s(), action=pending.command.action
            )
            self._send(self._links[pending.site], again)

    def _send(self, link: _Link, request: Request) -> None:
        if link.sock is None:
            return
        try:
            link.sock.send(encode(request), zmq.NOBLOCK)
        except zmq.Again:
            pass  # not connected for long; it is sent again

    def _receive(self, link: _Link, frames: list[zmq.Frame]) -> None:
        try:
            report = decode_report(frames[-1].bytes)
        except ProtocolError as error:
            self._say(link, str(error))
            return
        if not isinstance(report, Answer) and report.site != link.site:
            self._say(link, f"the agent there is of site {report.site}")
            return
        if link.said:
            logger.info("reports of site %s come again", link.site)
            link.said = ""
        assert self._asyncio is not None
        try:
            self._asyncio.call_soon_threadsafe(self._deliver, report)
        except RuntimeError:
            logger.info("reports of site %s: the router has stopped", link.site)

    # --- in the event loop --------------------------------------------------------------------------------------------

    def _deliver(self, report: SiteLoads | SiteState | Answer | CacheUpdate) -> None:
        if isinstance(report, Answer):
            pending = self._pending.get(report.id)
            if pending is not None and not pending.answered.done():
                pending.answered.set_result(report)
        elif isinstance(report, CacheUpdate):
            self._on_cache(report)
        elif self.reports.accept(report):
            if isinstance(report, SiteState):
                self._on_state(report)
            else:
                self._on_loads(report)
