"""The simulated sites: their servers, links and caches, and the events to come."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.core.request import ServerKey
from sglang_prfaas.scheduler import Observation, ServerView, SiteView
from sglang_prfaas.scheduler.types import ServerRole
from sglang_prfaas.simulate.cluster import Cluster
from sglang_prfaas.simulate.link import SharedLink
from sglang_prfaas.simulate.servers import DecodeServer, PrefillServer, PrefixCache

PRFAAS, PD = "prfaas", "pd"


class World:
    """Everything that has a state. Times in seconds on the virtual clock."""

    def __init__(self, cluster: Cluster) -> None:
        cluster.check()
        self.cluster = cluster
        self.egress = SharedLink(cluster.fleet.egress_gbps, cluster.rtt_s, cluster.connections)
        """PrfaaS to PD: KVCache of offloaded requests, and prefixes fetched from there."""
        self.ingress = SharedLink(cluster.fleet.egress_gbps, cluster.rtt_s, cluster.connections)
        """PD to PrfaaS: prefixes fetched from the PD site. A link carries as much either way."""
        self.caches = {PRFAAS: PrefixCache(cluster.cache_blocks), PD: PrefixCache(cluster.cache_blocks)}
        self.prefill: dict[ServerKey, PrefillServer] = {}
        self.decode: dict[ServerKey, DecodeServer] = {}
        self.sites = {PRFAAS: SiteView(PRFAAS, "prfaas", []), PD: SiteView(PD, "pd", [])}
        self.observation = Observation(list(self.sites.values()), 0)
        self._clock = VirtualClock()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0
        self._slots = cluster.fleet.pd_decode.batch_max(cluster.slo_tokens_per_s)
        self._build()

    def _build(self) -> None:
        cluster, shared = self.cluster, self.cluster.shared
        for index in range(cluster.fleet.n_prfaas):
            self.add_prefill(PRFAAS, f"prefill-{index}")
        for index in range(int(cluster.n_p)):
            self.add_prefill(PD, f"prefill-{index}")
        for index in range(cluster.whole_decode):
            self.add_decode(f"decode-{index}")
        if shared:
            both = self.add_prefill(PD, "shared-prefill")
            if places := int(self._slots * (1 - shared) + 1e-9):
                self.add_decode("shared-decode", places, both)

    def add_prefill(self, site: str, name: str) -> PrefillServer:
        """A prefill server enters the rotation."""
        profile = self.cluster.fleet.prfaas_prefill if site == PRFAAS else self.cluster.fleet.pd_prefill
        assert profile is not None
        server = PrefillServer(self._view(site, name, "prefill"), profile)
        self.prefill[server.view.key] = server
        return server

    def add_decode(self, name: str, places: int = 0, shares: PrefillServer | None = None) -> DecodeServer:
        """A decode server of the PD site enters the rotation; `places`: fewer than the SLO allows."""
        step_s = self.cluster.fleet.pd_decode.step_s
        view = self._view(PD, name, "decode")
        server = DecodeServer(view, places or self._slots, self._slots, step_s, shares)
        server.advance(self.now_s)
        self.decode[view.key] = server
        return server

    def remove(self, view: ServerView) -> None:
        """A server leaves the rotation for good, or until it is added in another role."""
        self.sites[view.site].servers.remove(view)
        self.prefill.pop(view.key, None)
        self.decode.pop(view.key, None)

    def _view(self, site: str, name: str, role: ServerRole) -> ServerView:
        view = ServerView(site, name, role, alive=True)
        self.sites[site].servers.append(view)
        return view

    def prefill_of(self, site: str) -> list[PrefillServer]:
        """The prefill servers of one site, dead or alive."""
        return [server for key, server in self.prefill.items() if key[0] == site]

    # --- time -------------------------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return self._clock.now_s()

    def at(self, at_s: float, action: Callable[[], None]) -> None:
        """Do something then; not before now."""
        self._counter += 1
        heapq.heappush(self._events, (at_s, self._counter, action))

    def step(self, links_moved: Callable[[], None]) -> bool:
        """Go on to the next event. `links_moved` is called where a link has one before. False: there is none."""
        link_s = min(self.egress.next_event_s(), self.ingress.next_event_s())
        if not self._events and link_s == float("inf"):
            return False
        if not self._events or link_s <= self._events[0][0]:
            self._move_to(link_s)
            links_moved()
            return True
        at_s, _, action = heapq.heappop(self._events)
        self._move_to(at_s)
        action()
        return True

    def _move_to(self, at_s: float) -> None:
        self._clock.advance(max(0.0, at_s - self.now_s))
