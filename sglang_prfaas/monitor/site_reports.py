"""What a router knows from its agents' reports: the newest of every site, and whether it is fresh enough to be trusted.

Pure: reports in, loads out, the clock passed in. An age is what the sender said plus the time since the report came, on
this side's clock; how long it was on its way is not known, and left out.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.monitor.reports import LinkLoad, ServerLoad, SiteLoads, SiteState


class _Site(Struct):
    epoch: int
    sequence: int
    heard_at_s: float
    state: SiteState | None = None
    loads: SiteLoads | None = None
    loads_at_s: float = 0.0
    servers: dict[str, ServerLoad] = {}
    gaps: int = 0
    restarts: int = 0


class SiteReports:
    """The newest reports of all sites. Not thread-safe.

    An agent numbers its reports. A smaller number than the last is one that was overtaken, and dropped; another epoch
    is an agent that was started anew, of which nothing old holds. A gap is counted; every report is complete by itself.
    """

    def __init__(self, clock: Clock, stale_after_s: float) -> None:
        """stale_after_s: age from which figures are not given out any more."""
        self._clock = clock
        self._stale_after_s = stale_after_s
        self._sites: dict[str, _Site] = {}

    def accept(self, report: SiteLoads | SiteState) -> bool:
        """Take a report in; False for one that came too late."""
        now_s = self._clock.now_s()
        known = self._sites.get(report.site)
        if known is None or known.epoch != report.epoch:
            restarts = 0 if known is None else known.restarts + 1
            gaps = 0 if known is None else known.gaps
            known = _Site(report.epoch, report.sequence, now_s, gaps=gaps, restarts=restarts)
            self._sites[report.site] = known
        elif report.sequence <= known.sequence:
            return False
        else:
            known.gaps += report.sequence - known.sequence - 1
        known.sequence, known.heard_at_s = report.sequence, now_s
        if isinstance(report, SiteState):
            known.state = report
        else:
            known.loads, known.loads_at_s = report, now_s
            known.servers = {load.server: load for load in report.servers}
        return True

    def heard_within(self, site: str, seconds: float) -> bool:
        """Whether the agent of a site has reported anything lately."""
        known = self._sites.get(site)
        return known is not None and self._clock.now_s() - known.heard_at_s <= seconds

    def fresh(self, site: str) -> bool:
        """Whether the agent of a site has reported within `stale_after_s`."""
        return self.heard_within(site, self._stale_after_s)

    def state(self, site: str) -> SiteState | None:
        """The servers of a site as its agent listed them last, however long ago."""
        known = self._sites.get(site)
        return known.state if known is not None else None

    def server(self, site: str, name: str) -> ServerLoad | None:
        """The load of a server with its age now; None where it is unknown or stale."""
        known = self._sites.get(site)
        load = known.servers.get(name) if known is not None else None
        if known is None or load is None:
            return None
        age_s = load.age_s + self._clock.now_s() - known.loads_at_s
        return msgspec.structs.replace(load, age_s=age_s) if age_s <= self._stale_after_s else None

    def links(self) -> list[LinkLoad]:
        """Every link that a site reports, with its age now, without the stale ones."""
        found = []
        for known in self._sites.values():
            for link in known.loads.links if known.loads is not None else ():
                age_s = link.age_s + self._clock.now_s() - known.loads_at_s
                if age_s <= self._stale_after_s:
                    found.append(msgspec.structs.replace(link, age_s=age_s))
        return found

    def link(self, from_site: str, to_site: str) -> LinkLoad | None:
        """One direction of a link; None where it is unknown or stale."""
        return next((one for one in self.links() if (one.from_site, one.to_site) == (from_site, to_site)), None)

    def counters(self) -> dict[str, tuple[int, int, float]]:
        """By site: reports that were missing, restarts of the agent, and seconds since its last report."""
        now_s = self._clock.now_s()
        return {name: (site.gaps, site.restarts, now_s - site.heard_at_s) for name, site in self._sites.items()}
