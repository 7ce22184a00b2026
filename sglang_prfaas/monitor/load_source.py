"""Where a router gets reports of loads and links from."""

from __future__ import annotations

from typing import Protocol

from sglang_prfaas.monitor.reports import LinkLoad, ServerLoad


class LoadSource(Protocol):
    """The last report of each server and link. `age_s` of what it returns is the age now, not when it was sent."""

    def server(self, site: str, name: str) -> ServerLoad | None:
        """Load of a server; None where nothing, or nothing fresh, is known."""

    def link(self, from_site: str, to_site: str) -> LinkLoad | None:
        """State of one direction of a link; None where nothing, or nothing fresh, is known."""
