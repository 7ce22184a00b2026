"""The per-request decision: uncached length against the threshold t, then the least loaded server of each role.

PrfaaS section 3.4.3. A pure function: it reads the observation and changes nothing. Where t comes from, fixed or
live, is not its business.
"""

from __future__ import annotations

from sglang_prfaas.core.request import RequestView, Route, ServerKey
from sglang_prfaas.scheduler.types import (
    FULL,
    Decision,
    Observation,
    Preference,
    ReasonClass,
    ServerRole,
    ServerView,
    SiteView,
)

_DECODE_AFFINITY_REQUESTS = 1.0
"""A decode server that holds a part of the prompt, which then is not sent, may have so many requests more."""


def site_prefix(site: SiteView) -> int:
    """Tokens of the request's prefix that the site can use, if the request goes to the right server."""
    return max(site.cached_tokens, max(site.affinity.values())) if site.affinity else site.cached_tokens


def uncached_length(observation: Observation, request: RequestView, home: str = "") -> int:
    """Tokens left to prefill (PrfaaS section 3.4.3).

    Scarce bandwidth: l_total - l_pd, caches judged apart. Ample: l_total - max(l_prfaas, l_pd), the longer prefix is
    fetched across. `home`: the PD site that l_pd is of; by default whichever holds most.
    """
    l_prfaas = l_pd = 0
    for site in observation.sites:
        held = site_prefix(site) if site.affinity else site.cached_tokens
        if site.role != "pd":
            if held > l_prfaas:
                l_prfaas = held
        elif held > l_pd and (not home or site.name == home):
            l_pd = held
    l_prefix = l_pd if observation.bandwidth_scarce else max(l_prfaas, l_pd)
    return max(0, request.l_total - l_prefix)


class LeastLoaded:
    """The least loaded servers of single sites, as long as `SiteView.version` says that nothing there has changed."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, ServerRole], tuple[int, list[ServerView]]] = {}

    def of(self, site: SiteView, role: ServerRole) -> list[ServerView]:
        """The least loaded server of a role that is alive, without cached prefixes; empty where there is none."""
        found = self._found.get((site.name, role))
        if found is None or found[0] != site.version:
            best = (_idlest_prefill if role == "prefill" else _idlest_decode)(site.servers)
            found = self._found[site.name, role] = (site.version, [best] if best is not None else [])
        return found[1]


def decide(
    observation: Observation,
    request: RequestView,
    *,
    home: str = "",
    prefer: Preference | None = None,
    least: LeastLoaded | None = None,
) -> Decision:
    """Choose route and servers for one request.

    Uncached length above t goes to a PrfaaS site, the rest to a PD site's prefill, unless `prefer` says otherwise; each
    falls back on the other where it has no server alive, or only ones that failed for this request. A forced route
    falls back on nothing. `home`: the PD site that is to decode, as long as it can. `least`: what is known of sites,
    where whoever watches the servers keeps `SiteView.version`.
    """
    t = observation.t_tokens
    avoid = request.avoid
    uncached = uncached_length(observation, request, home)
    about = "" if request.exact else "about "
    pd = [site for site in observation.sites if site.role == "pd"]

    at_home = [site for site in pd if site.name == home] if home else pd
    fresh, any_decode = _least_loaded(at_home, "decode", avoid, least)
    if fresh is None and home:
        fresh, any_decode = _least_loaded(pd, "decode", avoid, least)
    decode = fresh or any_decode
    if decode is None:
        reason = "no decode server of the PD site is alive"
        return Decision(None, None, None, reason, "no_decode", t, uncached)
    if (busy := _busy(observation, decode)) and not avoid:
        return Decision(None, None, decode, busy, "busy_decode", t, uncached, retry_after_s=1.0)

    is_long = uncached > t
    wanted: Route = request.forced or (prefer.route if prefer else "prfaas" if is_long else "local")
    fallback: Route = "local" if wanted == "prfaas" else "prfaas"
    comparison = f"uncached {about}{uncached} {'>' if is_long else '<='} t {t}"
    place = "PrfaaS" if wanted == "prfaas" else "local"
    prefill, again = _prefill(observation, wanted, decode, avoid, least)

    if request.forced is not None:
        if (chosen := prefill or again) is None:
            reason = f"route {wanted} was forced, but no {place} prefill server is alive"
            return Decision(None, None, decode, reason, "no_prefill", t, uncached)
        return Decision(wanted, chosen, decode, f"forced by header; {comparison}", "forced", t, uncached)

    usual: ReasonClass = "long" if is_long else "short"
    if prefer is not None:
        usual, comparison = prefer.reason_class, f"{comparison}, but {prefer.why}"
    if prefill is not None:
        return Decision(wanted, prefill, decode, comparison, usual, t, uncached)
    missing: ReasonClass = "no_prfaas" if wanted == "prfaas" else "no_local"
    state = "failed for this request" if again else "is alive"
    why = f"{comparison}, but {'every' if again else 'no'} {place} prefill server {state}"
    other, other_again = _prefill(observation, fallback, decode, avoid, least)
    if other is not None:
        return Decision(fallback, other, decode, why, missing, t, uncached)
    if again is not None:
        return Decision(wanted, again, decode, f"{why}: tried again", usual, t, uncached)
    if other_again is not None:
        return Decision(fallback, other_again, decode, f"{why}: tried again", missing, t, uncached)
    return Decision(None, None, decode, "no prefill server of any site is alive", "no_prefill", t, uncached)


Pair = tuple[ServerView | None, ServerView | None]


def _busy(observation: Observation, decode: ServerView) -> str:
    """Why the least loaded decode server, and so every one, must get no request; empty if it may."""
    if decode.extra_load >= FULL:
        return "the KV of every decode server is full"
    most = observation.max_decode_requests
    if most and decode.inflight_requests + decode.extra_load >= most:
        return f"every decode server has {most} requests, which is policy.max_decode_requests"
    return ""


def _prefill(
    observation: Observation,
    route: Route,
    decode: ServerView,
    avoid: frozenset[ServerKey],
    least: LeastLoaded | None,
) -> Pair:
    """The least loaded prefill server of a route. With several PD sites, local means the datacenter that decodes."""
    if route == "prfaas":
        return _least_loaded([site for site in observation.sites if site.role == "prfaas"], "prefill", avoid, least)
    pd = [site for site in observation.sites if site.role == "pd"]
    at_home = _least_loaded([site for site in pd if site.name == decode.site], "prefill", avoid, least)
    return at_home if at_home[1] is not None else _least_loaded(pd, "prefill", avoid, least)


def _least_loaded(
    sites: list[SiteView], role: ServerRole, avoid: frozenset[ServerKey], least: LeastLoaded | None
) -> Pair:
    """The least loaded server that is alive: among those not to avoid, and among all.

    Prefill is loaded by the time and then the tokens that it has in work, decode by its requests; what a site costs
    beyond the queue, and a prefix that a server holds, count as time.
    """
    known = least if not avoid else None
    candidates = []
    for site in sites:
        prefixes = site.affinity if role == "prefill" else site.decode_affinity
        servers = site.servers if known is None or prefixes else known.of(site, role)
        candidates.append((site.cost_s, site, servers))
    return _least_of(candidates, role, avoid)


def _least_of(
    candidates: list[tuple[float, SiteView, list[ServerView]]], role: ServerRole, avoid: frozenset[ServerKey]
) -> Pair:
    """`_least_loaded` of these servers, each site with its cost. One pass and few attributes for each server."""
    best: ServerView | None = None
    load = second = float("inf")
    skipped: list[ServerView] = []
    for cost_s, site, servers in candidates:
        affinity, saved_s = site.affinity, site.saved_s
        for server in servers:
            if not server.alive or server.role != role:
                continue
            if avoid and server.key in avoid:
                skipped.append(server)
                continue
            if role == "prefill":
                own = server.wait_s + cost_s
                own_second = server.inflight_tokens
                if affinity and server.name in affinity:
                    held = max(0, affinity[server.name] - site.cached_tokens)
                    own -= saved_s.get(server.name, 0.0)
                    own_second -= held
                if own > load:
                    continue
            else:
                own = server.inflight_requests + server.extra_load
                own_second = 0
                if site.decode_affinity and server.name in site.decode_affinity:
                    own -= _DECODE_AFFINITY_REQUESTS
                    own_second = -site.decode_affinity[server.name]
                if own > load:
                    continue
            if own == load and (
                own_second > second or (own_second == second and best and _order(best) < _order(server))
            ):
                continue
            best, load, second = server, own, own_second
    if best is None and skipped:
        return None, min(skipped, key=_prefill_load) if role == "prefill" else min(skipped, key=_order)
    return best, best


def _idlest_prefill(servers: list[ServerView]) -> ServerView | None:
    """`_least_loaded` of one site, without cached prefixes: its cost is the same for all."""
    best: ServerView | None = None
    load = second = float("inf")
    for server in servers:
        own = server.wait_s
        if own > load or server.role != "prefill" or not server.alive:
            continue
        own_second = server.inflight_tokens
        if own == load and (own_second > second or (own_second == second and best and _order(best) < _order(server))):
            continue
        best, load, second = server, own, own_second
    return best


def _idlest_decode(servers: list[ServerView]) -> ServerView | None:
    """The same for decode."""
    best: ServerView | None = None
    load = float("inf")
    for server in servers:
        if server.role != "decode" or not server.alive:
            continue
        own = server.inflight_requests + server.extra_load
        if own > load or (own == load and best and _order(best) < _order(server)):
            continue
        best, load = server, own
    return best


def _order(server: ServerView) -> tuple[int, int, str, str]:
    """What decides between servers of the same load; the names make it repeatable."""
    return (server.inflight_requests, server.served, server.site, server.name)


def _prefill_load(server: ServerView) -> tuple[float, int, int, int, str, str]:
    return (server.wait_s, server.inflight_tokens, *_order(server))
