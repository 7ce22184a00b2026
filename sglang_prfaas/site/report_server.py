"""The agent's end of the connections to routers: reports go up to all of them, commands come down.

A ZeroMQ ROUTER in a thread of its own, with the site's CURVE keys and the same allow-list as the mover. What comes from
routers is handed to the agent's event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.errors import LocalError, ProtocolError
from sglang_prfaas.monitor.cache_reports import CacheUpdate, ReadCache
from sglang_prfaas.monitor.reports import VERSION, Answer, Command, Report, Subscribe
from sglang_prfaas.monitor.wire import decode_request, encode
from sglang_prfaas.transport.addresses import endpoint, resolve
from sglang_prfaas.transport.clients import Doomed
from sglang_prfaas.transport.loop import ZmqLoop
from sglang_prfaas.transport.security import load_security
from sglang_prfaas.transport.security.refusals import RefusalLog

logger = logging.getLogger(__name__)

LEASE_S = 10.0
"""A router that was silent for so long gets no more reports."""
_REPORTS_QUEUED = 64
"""Reports that wait for one router before further ones are dropped for it; each is complete by itself."""

OnCommand = Callable[[Command, Callable[[Answer], None]], None]
OnReadCache = Callable[[ReadCache, Callable[[CacheUpdate], None]], None]


class _Router(Struct):
    name: str
    heard_at_s: float


class ReportServer:
    """Binds, and serves routers. Callbacks run in the event loop it was made in."""

    def __init__(
        self,
        config: SiteConfig,
        clock: Clock,
        *,
        on_subscribed: Callable[[], None],
        on_command: OnCommand,
        on_read_cache: OnReadCache = lambda asked, reply: None,
    ) -> None:
        """on_subscribed: a router is new, and knows nothing yet. on_read_cache: one asks what caches hold. Raises
        LocalError where the port is taken, ConfigError where others could reach it without keys, or where keys do not
        fit."""
        self._site = config.site.name
        self._commanders = frozenset(config.agent.commands_from or [config.site.name])
        self._clock = clock
        self._on_subscribed = on_subscribed
        self._on_command = on_command
        self._on_read_cache = on_read_cache
        self._asyncio = asyncio.get_running_loop()
        self._routers: dict[bytes, _Router] = {}
        address = resolve(config.agent.host)
        self._security = load_security(config.transport)
        risk = "can read loads and drain servers"
        self._security.may_listen("the agent's report port", address, config.transport, risk)
        self._refusals = RefusalLog(logger, clock)
        self._loop = ZmqLoop("prfaas-reports", clock, self._security, config.transport.control_messages_per_s)
        self._socket = self._loop.socket(zmq.ROUTER, address)
        self._socket.setsockopt(zmq.SNDHWM, _REPORTS_QUEUED)
        try:
            self._socket.bind(endpoint(address, config.agent.reports_port))
        except zmq.ZMQError as error:
            self._loop.stop()
            raise LocalError(
                f"agent.reports_port {config.agent.reports_port} on {config.agent.host} cannot be used: {error}; "
                "write another"
            ) from None
        self.port = int(self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._loop.add(self._socket, self._receive)
        self._loop.on_cut(self._socket, self._client_cut)
        self._loop.every(LEASE_S / 4, self._expire)
        self.routers = 0
        """Routers that are subscribed now."""

    def start(self) -> None:
        self._loop.start()

    def broadcast(self, report: Report) -> None:
        """Send a report to every router. From any thread."""
        data = encode(report)

        def send() -> None:
            for identity in self._routers:
                self._send(identity, data)

        self._loop.call(send)

    def stop(self) -> None:
        """Close; blocks until the thread has ended."""
        self._loop.stop(linger_ms=200)

    def _send(self, identity: bytes, data: bytes) -> None:
        try:
            self._socket.send_multipart([identity, data], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            logger.info("reports: nothing sent to a router: %s", error)

    def _receive(self, frames: list[zmq.Frame]) -> None:
        if len(frames) != 2:
            return
        identity = frames[0].bytes
        site = self._site_of(frames[1])
        try:
            request = decode_request(frames[1].bytes)
        except ProtocolError as error:
            self._refusals.warn(f"reports: from a router of site {site or '?'}: {error}")
            return
        if isinstance(request, Subscribe):
            self._subscribed(identity, request, site)
            return

        def reply(answer: Answer | CacheUpdate) -> None:
            data = encode(answer)
            self._loop.call(lambda: self._send(identity, data))

        if isinstance(request, ReadCache):
            self._to_asyncio(lambda: self._on_read_cache(request, reply))
            return
        if self._security.keys is not None and site not in self._commanders:
            text = f"routers of site {site} may not command site {self._site}; see agent.commands_from"
            reply(Answer(id=request.id, done=False, message=text))
            return
        self._to_asyncio(lambda: self._on_command(request, reply))

    def _subscribed(self, identity: bytes, request: Subscribe, site: str) -> None:
        if request.version != VERSION:
            if identity not in self._routers:
                logger.warning(
                    "reports: router %s speaks version %d, this agent %d", request.router, request.version, VERSION
                )
            return
        known = self._routers.get(identity)
        if known is not None:
            known.heard_at_s = self._clock.now_s()
            return
        self._routers[identity] = _Router(request.router, self._clock.now_s())
        self.routers = len(self._routers)
        logger.info("reports: router %s%s is connected", request.router, f" of site {site}" if site else "")
        self._to_asyncio(self._on_subscribed)

    def _client_cut(self, doomed: Doomed) -> bool:
        """A router's connection is about to be cut: it gets no more reports."""
        router = self._routers.pop(doomed.identity, None)
        if router is None:
            return False
        self.routers = len(self._routers)
        logger.warning("reports: router %s at %s is cut off: %s", router.name, doomed.who, doomed.reason)
        return True

    def _expire(self) -> None:
        now_s = self._clock.now_s()
        for identity, router in list(self._routers.items()):
            if now_s - router.heard_at_s > LEASE_S:
                logger.info("reports: router %s is gone", router.name)
                del self._routers[identity]
        self.routers = len(self._routers)

    def _site_of(self, frame: zmq.Frame) -> str:
        """The site whose key the router has proved to hold; empty without keys."""
        return str(frame.get("User-Id")) if self._security.keys is not None else ""

    def _to_asyncio(self, function: Callable[[], None]) -> None:
        try:
            self._asyncio.call_soon_threadsafe(function)
        except RuntimeError:
            logger.info("reports: the agent has stopped; a router's message is dropped")
