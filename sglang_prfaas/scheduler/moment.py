"""One look at all sites, digested: what decisions until the next look need of servers and links."""

from __future__ import annotations

from typing import NamedTuple

from msgspec import Struct

from sglang_prfaas.scheduler.short_term import LeastLoaded
from sglang_prfaas.scheduler.threshold import LiveState
from sglang_prfaas.scheduler.types import LinkView, SiteView

_INFINITE = float("inf")


class SiteLoad(Struct):
    """One site, digested: prefill servers alive, the least wait among them, the least decode load (infinite: none)."""

    servers: int
    wait_s: float
    decode_load: float


class Way(NamedTuple):
    """From one PrfaaS site to one PD site, digested: what does not depend on the request."""

    site: str
    link: LinkView | None
    wait_s: float
    """Until the link has sent what is ready."""
    s_per_byte: float
    state_s: float
    """The state, which is sent after prefill, and half a round trip."""


class Ways(Struct):
    """What is the same for every request between two looks. Lists are over the PrfaaS sites with a server alive."""

    far: list[str]
    to: dict[str, list[Way]]
    """By PD site."""
    least_state_s: float
    """The least of all."""


class Moment(Struct):
    """One look at all sites. `states`: what the threshold of each PD site rests on."""

    now_s: float
    loads: dict[str, SiteLoad]
    states: dict[str, LiveState]
    ways: Ways | None = None
    """Filled when a decision first needs it."""
    least: LeastLoaded | None = None
    """The least loaded servers, as far as decisions have needed them; None: loads may change without notice."""


def site_load(site: SiteView) -> SiteLoad:
    """The digest of one site."""
    load = SiteLoad(0, _INFINITE, _INFINITE)
    for server in site.servers:
        if not server.alive:
            continue
        if server.role == "prefill":
            load.servers += 1
            load.wait_s = min(load.wait_s, server.wait_s)
        else:
            load.decode_load = min(load.decode_load, server.inflight_requests + server.extra_load)
    load.wait_s += site.held_s
    return load
