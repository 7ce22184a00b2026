"""A mover's links: looks at the connections to every site, estimates, and says how much may be on its way to each."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping

from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.core.units import gbps_to_bytes_per_s
from sglang_prfaas.transport.admission import Admission, limit_of
from sglang_prfaas.transport.data_tcp import Connection
from sglang_prfaas.transport.link_estimator import ConnectionSample, LinkEstimator, LinkFigures
from sglang_prfaas.transport.outgoing_transfer import OutgoingTransfer

logger = logging.getLogger(__name__)

FORGET_S = 60.0
"""After which a link without sessions is forgotten."""

Report = Callable[[str, LinkFigures], None]
"""Called with the name of a site and the state of the link to it."""


class Traffic(Struct, frozen=True):
    """What goes to one decode rank. backlog_bytes: ready, and not acknowledged."""

    site: str
    connections: list[Connection]
    backlog_bytes: int


class _Link:
    def __init__(self, config: TransportConfig, link: LinkConfig | None, now_s: float) -> None:
        limits = [gbps_to_bytes_per_s(link.capacity_gbps)] if link is not None else []
        limits += [config.rate_limit_mbps * 1e6 / 8] if config.rate_limit_mbps else []
        capacity = min(limits, default=0.0)
        self.estimator = LinkEstimator(capacity, link.rtt_ms / 1e3 if link is not None else 0.0)
        self.admission: Admission[OutgoingTransfer] = Admission(timeout_s=config.admission_timeout_s)
        self.used_s = now_s


class LinkMonitor:
    """All links of one mover. `look` and `admission` belong to one thread; `figures` may be called from any."""

    def __init__(
        self,
        config: TransportConfig,
        clock: Clock,
        *,
        links: Mapping[str, LinkConfig],
        pool_bytes: int,
        report: Report | None,
    ) -> None:
        """links: as configured, by site. pool_bytes: of all pages of this rank."""
        self._config = config
        self._clock = clock
        self._configured = links
        self._pool_bytes = pool_bytes
        self._report = report
        self._links: dict[str, _Link] = {}
        self._lock = threading.Lock()
        self._rested: dict[int, tuple[int, ConnectionSample]] = {}
        """Of connections with nothing on its way at the last look: what had been handed to each by then, and the
        sample."""
        self._blind = False

    def admission(self, site: str) -> Admission[OutgoingTransfer]:
        """What is let in over the link to a site."""
        return self._link(site).admission

    def figures(self, site: str) -> LinkFigures | None:
        """The link to a site as of the last look, None where there is none."""
        with self._lock:
            link = self._links.get(site)
        return link.estimator.figures if link is not None else None

    def look(self, traffic: Iterable[Traffic]) -> None:
        """Sample every connection that stands, and report every link. One that is at rest is not looked at again: the
        kernel has nothing new to tell of it."""
        now_s = self._clock.now_s()
        samples: dict[str, list[ConnectionSample]] = {}
        backlogs: dict[str, int] = {}
        rested, self._rested = self._rested, {}
        for one in traffic:
            found = samples.setdefault(one.site, [])
            for connection in one.connections:
                sent_bytes = connection.sent_bytes
                before = rested.get(connection.number)
                idle = before is not None and before[0] == sent_bytes
                sample = before[1] if before is not None and idle else self._sample(connection)
                if sample is None:
                    continue
                found.append(sample)
                if not sample.queued_bytes:
                    self._rested[sample.key] = sent_bytes, sample
            backlogs[one.site] = backlogs.get(one.site, 0) + one.backlog_bytes
            self._link(one.site).used_s = now_s
        with self._lock:
            for site in [site for site, link in self._links.items() if now_s - link.used_s > FORGET_S]:
                del self._links[site]
            links = dict(self._links)
        for site, link in links.items():
            figures = link.estimator.look(now_s, samples.get(site, ()), backlogs.get(site, 0))
            link.admission.limit_bytes = limit_of(
                self._config.max_link_inflight_bytes,
                figures.capacity_bytes_per_s,
                figures.rtt_s,
                self._pool_bytes,
                len(links),
            )
            if self._report is not None:
                self._report(site, figures)

    def _link(self, site: str) -> _Link:
        with self._lock:
            link = self._links.get(site)
            if link is None:
                link = self._links[site] = _Link(self._config, self._configured.get(site), self._clock.now_s())
            return link

    def _sample(self, connection: Connection) -> ConnectionSample | None:
        """None for one that is closed."""
        queued = connection.unsent_bytes()
        info = connection.tcp_info()
        if info is not None:
            return ConnectionSample(
                key=connection.number,
                acked_bytes=info.acked_bytes,
                sent_segments=info.sent_segments,
                retransmitted_segments=info.retransmitted_segments,
                rtt_s=info.rtt_s,
                min_rtt_s=info.min_rtt_s,
                queued_bytes=queued,
                notsent_bytes=info.notsent_bytes,
                app_limited=info.app_limited,
                busy_s=info.busy_s,
                held_back_s=info.rwnd_limited_s + info.sndbuf_limited_s,
            )
        if connection.closed:
            return None
        if not self._blind:
            self._blind = True
            logger.warning(
                "prfaas: this system does not tell about TCP connections (TCP_INFO): of links, only traffic and "
                "backlog are known, and their capacity as configured"
            )
        return ConnectionSample(
            key=connection.number, acked_bytes=max(0, connection.sent_bytes - queued), queued_bytes=queued
        )
