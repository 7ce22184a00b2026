"""The per-request decision: uncached length against the threshold t, then the least loaded server of each role.

PrfaaS section 3.4.3, with a fixed t. A pure function: it reads the observation and changes nothing.
"""

from __future__ import annotations

from sglang_prfaas.core.request import RequestView, Route, ServerKey
from sglang_prfaas.scheduler.types import Decision, Observation, ReasonClass, ServerView


def uncached_length(observation: Observation, request: RequestView) -> int:
    """Tokens left to prefill (PrfaaS section 3.4.3).

    Scarce bandwidth: l_total - l_pd, caches judged apart. Ample: l_total - max(l_prfaas, l_pd), the longer prefix is
    fetched across.
    """
    l_prfaas = l_pd = 0
    for site in observation.sites:
        if site.role == "pd":
            l_pd = max(l_pd, site.cached_tokens)
        else:
            l_prfaas = max(l_prfaas, site.cached_tokens)
    l_prefix = l_pd if observation.bandwidth_scarce else max(l_prfaas, l_pd)
    return max(0, request.l_total - l_prefix)


def decide(observation: Observation, request: RequestView) -> Decision:
    """Choose route and servers for one request.

    Uncached length above t goes to a PrfaaS site, the rest to a PD site's prefill; each falls back on the other where
    it has no server alive, or only ones that failed for this request. A forced route falls back on nothing.
    """
    t = observation.t_tokens
    uncached = uncached_length(observation, request)
    about = "" if request.exact else "about "
    local: list[ServerView] = []
    remote: list[ServerView] = []
    decodes: list[ServerView] = []
    for site in observation.sites:
        for server in site.servers:
            if not server.alive:
                continue
            if server.role == "prefill":
                (remote if site.role == "prfaas" else local).append(server)
            elif site.role == "pd":
                decodes.append(server)

    if not decodes:
        reason = "no decode server of the PD site is alive"
        return Decision(None, None, None, reason, "no_decode", t, uncached)
    decode = _least_loaded(_others(decodes, request.avoid) or decodes, by_tokens=False)
    # With several PD sites, local means the datacenter that decodes.
    local = [s for s in local if s.site == decode.site] or local

    is_long = uncached > t
    wanted: Route = request.forced or ("prfaas" if is_long else "local")
    first, second = (remote, local) if wanted == "prfaas" else (local, remote)
    comparison = f"uncached {about}{uncached} {'>' if is_long else '<='} t {t}"
    place = "PrfaaS" if wanted == "prfaas" else "local"

    if request.forced is not None:
        servers = _others(first, request.avoid) or first
        if not servers:
            reason = f"route {wanted} was forced, but no {place} prefill server is alive"
            return Decision(None, None, decode, reason, "no_prefill", t, uncached)
        prefill = _least_loaded(servers, by_tokens=True)
        return Decision(wanted, prefill, decode, f"forced by header; {comparison}", "forced", t, uncached)

    if servers := _others(first, request.avoid):
        reason_class: ReasonClass = "long" if is_long else "short"
        return Decision(wanted, _least_loaded(servers, by_tokens=True), decode, comparison, reason_class, t, uncached)
    fallback: Route = "local" if wanted == "prfaas" else "prfaas"
    missing: ReasonClass = "no_prfaas" if wanted == "prfaas" else "no_local"
    state = "failed for this request" if first else "is alive"
    why = f"{comparison}, but {'every' if first else 'no'} {place} prefill server {state}"
    if servers := _others(second, request.avoid):
        return Decision(fallback, _least_loaded(servers, by_tokens=True), decode, why, missing, t, uncached)
    if first:
        prefill = _least_loaded(first, by_tokens=True)
        again: ReasonClass = "long" if is_long else "short"
        return Decision(wanted, prefill, decode, f"{why}: tried again", again, t, uncached)
    if second:
        prefill = _least_loaded(second, by_tokens=True)
        return Decision(fallback, prefill, decode, f"{why}: tried again", missing, t, uncached)
    return Decision(None, None, decode, "no prefill server of any site is alive", "no_prefill", t, uncached)


def _others(servers: list[ServerView], avoid: frozenset[ServerKey]) -> list[ServerView]:
    return [s for s in servers if s.key not in avoid] if avoid else servers


def _least_loaded(servers: list[ServerView], *, by_tokens: bool) -> ServerView:
    """Prefill is loaded by the time and the tokens that it has in work, decode by its requests."""
    if len(servers) == 1:
        return servers[0]
    if by_tokens:
        return min(servers, key=lambda s: (s.wait_s, s.inflight_tokens, s.inflight_requests, s.served, s.site, s.name))
    return min(servers, key=lambda s: (s.inflight_requests, s.served, s.site, s.name))
