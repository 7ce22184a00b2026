"""Observation in, decision out: the values schedulers work on, live and simulated alike.

Lengths carry the paper's names (PrfaaS section 3.4.3): l_total, l_prfaas, l_pd, and the threshold t, all in tokens.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from sglang_prfaas.core.request import Route

SiteRole = Literal["prfaas", "pd"]
ServerRole = Literal["prefill", "decode"]

# Why a request took its route; a label of metrics. The last four mean that it has none.
ReasonClass = Literal[
    "short",  # uncached length at most t: local
    "long",  # uncached length above t: PrfaaS
    "forced",  # the client named the route
    "no_prfaas",  # long, but no PrfaaS prefill to use: local
    "no_local",  # short, but no local prefill to use: PrfaaS
    "slo",  # the threshold's path would miss the TTFT promised, the other one meets it
    "queue",  # the threshold's path would make it wait too long, the other one does not
    "idle",  # it waited for the threshold's path, and the other one was free first
    "busy_prefill",  # every path would make it wait too long
    "busy_decode",  # every decode server has as much as it may
    "no_decode",
    "no_prefill",
]


class ServerView(Struct, eq=False):
    """One server and its load. Written by whoever watches the servers; a scheduler only reads it."""

    site: str
    name: str
    role: ServerRole
    alive: bool = False
    inflight_requests: int = 0
    inflight_tokens: int = 0  # uncached prompt tokens that prefill has in work
    served: int = 0  # requests sent so far: breaks ties, so that equal servers take turns
    wait_s: float = 0.0  # seconds until prefill has worked off its queue, where whoever watches knows its speed
    # Decode: what reports say beyond our own requests, in requests: those of other routers, and for choosing among
    # equals the share of its KV that is taken. `FULL` and more: it must get none.
    extra_load: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        return (self.site, self.name)


FULL = 1e6
"""`extra_load` of a decode server that must get no request."""


class SiteView(Struct):
    """One datacenter. What follows `version` is about the request at hand."""

    name: str
    role: SiteRole
    servers: list[ServerView]
    version: int = 0  # grows with every change of a server, where whoever watches them keeps it
    cached_tokens: int = 0  # prefix that every prefill server of the site can use
    affinity: dict[str, int] = {}  # longer prefixes that single servers hold, in tokens by server
    decode_affinity: dict[str, int] = {}  # what of it decode servers hold, in tokens by server
    saved_s: dict[str, float] = {}  # what the longer prefixes save, in seconds by server, where that is known
    held_s: float = 0.0  # seconds of prefill that wait in front of each of its servers
    cost_s: float = 0.0  # PrfaaS: seconds from the end of the queue to the first token, to compare sites by


class SitePrefix(Struct, frozen=True):
    """What a site holds of one prompt, in tokens: for all of its servers, and where single ones hold more."""

    cached_tokens: int = 0
    servers: dict[str, int] = {}


class LinkView(Struct, frozen=True, kw_only=True):
    """The link from a PrfaaS site to a PD site."""

    bytes_per_s: float
    """What it carries at most; where more would only queue, what it carries now."""
    free_bytes_per_s: float
    """What other traffic leaves of it."""
    backlog_bytes: float = 0.0
    """KVCache that is ready and not yet sent."""
    rtt_s: float = 0.0
    measured: bool = False
    """Whether a fresh report says so; else it is as configured."""
    congested: bool = False

    @property
    def wait_s(self) -> float:
        """Seconds until the backlog is sent."""
        return self.backlog_bytes / self.bytes_per_s if self.bytes_per_s > 0 else float("inf")


class Observation(Struct):
    """The state a decision is made on."""

    sites: list[SiteView]
    t_tokens: int
    # Caches are judged apart (l_total - l_pd <= t) as long as a cached prefix is not fetched from the other site.
    bandwidth_scarce: bool = True
    links: dict[tuple[str, str], LinkView] = {}  # by (PrfaaS site, PD site)
    max_decode_requests: int = 0  # of one decode server; 0: no limit


class Preference(Struct, frozen=True):
    """A route other than the threshold's, and why."""

    route: Route
    reason_class: ReasonClass
    why: str


class Figures(Struct, frozen=True, kw_only=True):
    """What a live decision rests on. Times in seconds, infinite where there is no such path."""

    pd_site: str
    t_balanced: float
    utilisation: float
    """rho, of both prefill stages."""
    local_tokens: int
    prfaas_tokens: int
    """Tokens to compute on either path."""
    local_wait_s: float
    prfaas_wait_s: float
    """Queue of prefill, and where it is longer, of the link."""
    local_ttft_s: float
    prfaas_ttft_s: float
    """Expected: queue, prefill and exposed transfer."""
    link_gbps: float
    egress_utilisation: float
    bandwidth_scarce: bool


class Decision(Struct, frozen=True):
    """Where one request goes, and why. `route` is None when it cannot be served; `reason` then says what is missing."""

    route: Route | None
    prefill: ServerView | None
    decode: ServerView | None
    reason: str
    reason_class: ReasonClass
    t_tokens: int
    uncached_tokens: int
    figures: Figures | None = None
    retry_after_s: float = 0.0
    """Where it is refused for the load: when to ask again."""
