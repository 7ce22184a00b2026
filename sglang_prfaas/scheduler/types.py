"""Observation in, decision out: the values schedulers work on, live and simulated alike.

Lengths carry the paper's names (PrfaaS section 3.4.3): l_total, l_prfaas, l_pd, and the threshold t, all in tokens.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from sglang_prfaas.core.request import Route

SiteRole = Literal["prfaas", "pd"]
ServerRole = Literal["prefill", "decode"]

# Why a request took its route; a label of metrics. The last two mean that it has none.
ReasonClass = Literal[
    "short",  # uncached length at most t: local
    "long",  # uncached length above t: PrfaaS
    "forced",  # the client named the route
    "no_prfaas",  # long, but no PrfaaS prefill to use: local
    "no_local",  # short, but no local prefill to use: PrfaaS
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

    @property
    def key(self) -> tuple[str, str]:
        return (self.site, self.name)


class SiteView(Struct):
    """One datacenter. `cached_tokens`: prefix of the request at hand that its prefill servers hold."""

    name: str
    role: SiteRole
    servers: list[ServerView]
    cached_tokens: int = 0


class Observation(Struct):
    """The state a decision is made on."""

    sites: list[SiteView]
    t_tokens: int
    # Caches are judged apart (l_total - l_pd <= t) as long as a cached prefix is not fetched from the other site.
    bandwidth_scarce: bool = True


class Decision(Struct, frozen=True):
    """Where one request goes, and why. `route` is None when it cannot be served; `reason` then says what is missing."""

    route: Route | None
    prefill: ServerView | None
    decode: ServerView | None
    reason: str
    reason_class: ReasonClass
    t_tokens: int
    uncached_tokens: int
