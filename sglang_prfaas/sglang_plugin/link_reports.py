"""A mover's figures of its links, on their way to the site's agent."""

from __future__ import annotations

from collections.abc import Callable

from sglang_prfaas.core.link_counts import LinkCounts
from sglang_prfaas.monitor.link_channel import LinkSender
from sglang_prfaas.monitor.reports import LinkLoad
from sglang_prfaas.transport.link_estimator import LinkFigures


class LinkReports:
    """Called by a mover with every link's state. Belongs to the mover's thread; `close` it after the mover."""

    def __init__(self, endpoint: str, site: str, mover: str) -> None:
        """endpoint: of the agent. mover: unique in the site (`server/rank`)."""
        self._site = site
        self._sender = LinkSender(endpoint, mover)
        self.counts: Callable[[str], LinkCounts | None] = lambda site: None
        """Of the mover, by site; set once there is one."""

    def __call__(self, to_site: str, figures: LinkFigures) -> None:
        if to_site:
            self._sender.send(load_of(self._site, to_site, figures), self.counts(to_site))

    def close(self) -> None:
        self._sender.close()


def load_of(from_site: str, to_site: str, figures: LinkFigures) -> LinkLoad:
    """The figures as a report."""
    return LinkLoad(
        from_site=from_site,
        to_site=to_site,
        used_bytes_per_s=figures.used_bytes_per_s,
        capacity_bytes_per_s=figures.capacity_bytes_per_s,
        loss_fraction=figures.loss_fraction,
        rtt_s=figures.rtt_s,
        min_rtt_s=figures.min_rtt_s,
        backlog_bytes=figures.backlog_bytes,
        connections=figures.connections,
        filled=figures.filled,
        congested=figures.congested,
        congestion=figures.reason,
    )
