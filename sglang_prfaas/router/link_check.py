"""Whether the router's `[[sites.links]]` say of a link what the sending site's own `[[links]]` say: one warning if not.

Which counts where they differ: while the site's movers report a link, what they measured, or until then what their own
file says; without a fresh report, the router's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable

from sglang_prfaas.config.schema import RouterSite
from sglang_prfaas.monitor.reports import ConfiguredLink

log = logging.getLogger(__name__)

_RULE = (
    "the site's value counts while its servers report the link, the router's otherwise: write the same in both files"
)


class LinkCheck:
    """Looks at what agents tell, and says every difference once."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], str] = {}

    def told(self, site: RouterSite, links: Iterable[ConfiguredLink]) -> None:
        """Compare a site of the router's file with what its agent has in its own."""
        theirs = {link.to_site: link for link in links}
        for own in site.links:
            pair = (site.name, own.to_site)
            said = _difference(
                ConfiguredLink(to_site=own.to_site, capacity_gbps=own.capacity_gbps, rtt_ms=own.rtt_ms),
                theirs.get(own.to_site),
            )
            if said and said != self._said.get(pair):
                log.warning("link %s to %s: %s; %s", *pair, said, _RULE)
            self._said[pair] = said


def _difference(own: ConfiguredLink, theirs: ConfiguredLink | None) -> str:
    """What differs, with both values; empty where nothing does."""
    if theirs is None:
        return f"the router's file has {own.capacity_gbps:g} Gbps, the site's file has no [[links]] there"
    parts = [
        f"{key} is {mine:g} in the router's file, {its:g} in the site's"
        for key, mine, its in (
            ("capacity_gbps", own.capacity_gbps, theirs.capacity_gbps),
            ("rtt_ms", own.rtt_ms, theirs.rtt_ms),
        )
        if not math.isclose(mine, its, rel_tol=1e-6)
    ]
    return ", ".join(parts)
