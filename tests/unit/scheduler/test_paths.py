"""The search over pairs of sites, and the least loaded servers that are kept between changes, against naive ones."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.core.request import RequestView, Route
from sglang_prfaas.scheduler import Observation, ServerView, SiteView, decide, paper
from sglang_prfaas.scheduler.affinity import Serving
from sglang_prfaas.scheduler.fetching import with_fetch
from sglang_prfaas.scheduler.live import LivePolicy
from sglang_prfaas.scheduler.moment import Moment
from sglang_prfaas.scheduler.paths import DECODE_S_PER_REQUEST, Paths
from sglang_prfaas.scheduler.short_term import LeastLoaded
from sglang_prfaas.scheduler.types import LinkView

KV, HARDWARE = paper.PAPER_PROFILE.kv, ("H20", "H200")
WAITS_S = st.integers(0, 80).map(lambda eighths: eighths / 8)  # sums are exact: ties stay ties
RATES = st.sampled_from((1e7, 1.25e9, 12.5e9))


@st.composite
def servers(draw: st.DrawFn, site: str, role: str) -> list[ServerView]:
    made = []
    for index in range(draw(st.integers(1, 5))):
        kind = "prefill" if role == "prfaas" else draw(st.sampled_from(("prefill", "decode")))
        view = msgspec.convert({"site": site, "name": f"s{index}", "role": kind}, ServerView)
        view.alive = draw(st.booleans()) or draw(st.booleans())
        view.inflight_requests, view.inflight_tokens = draw(st.integers(0, 3)), draw(st.sampled_from((0, 700, 9000)))
        view.served, view.wait_s = draw(st.integers(0, 2)), draw(WAITS_S)
        made.append(view)
    return made


@st.composite
def observations(draw: st.DrawFn) -> Observation:
    """Some sites of either role, most pairs with a link, some with cached prefixes."""
    far, home = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sites = []
    for number in range(far + home):
        role = "prfaas" if number < far else "pd"
        name = f"{role}{number}"
        view = SiteView(name, "prfaas" if number < far else "pd", draw(servers(name, role)))
        view.cached_tokens = draw(st.sampled_from((0, 0, 1500)))
        if draw(st.integers(0, 3)) == 0:
            view.affinity = {s.name: draw(st.integers(0, 20_000)) for s in view.servers if s.role == "prefill"}
            view.decode_affinity = {s.name: draw(st.integers(0, 20_000)) for s in view.servers if s.role == "decode"}
        sites.append(view)
    names = [site.name for site in sites]
    links = {}
    for pair in ((a, b) for a in names[:far] for b in names[far:]):
        rate = draw(RATES)
        link = LinkView(
            bytes_per_s=rate,
            free_bytes_per_s=rate * draw(st.sampled_from((0.1, 1.0))),
            backlog_bytes=draw(st.sampled_from((0.0, 1e8))),
            rtt_s=draw(st.sampled_from((0.0, 0.02))),
        )
        if draw(st.integers(0, 4)):
            links[pair] = link
    return Observation(sites, 19_400, links=links, bandwidth_scarce=draw(st.booleans()))


def policy(seen: Observation) -> LivePolicy:
    curves = paper.PAPER_PROFILE.prefill
    made = LivePolicy(
        kv=KV,
        local={site.name: curves["H20"] for site in seen.sites if site.role == "pd"},
        prfaas={site.name: curves[HARDWARE[index % 2]] for index, site in enumerate(seen.sites) if site.role != "pd"},
        settings=PolicyConfig(profile="paper"),
    )
    for index, site in enumerate(seen.sites):
        made.learn(0.0, site.name, 20_000.0, 1.0 + 0.3 * index)
    return made


def serving(made: LivePolicy, moment: Moment, site: SiteView, l_total: int) -> tuple[float, float, int]:
    """Wait, T_prefill and tokens on the site's best server."""
    held = {server.name: site.affinity.get(server.name, 0) for server in site.servers if server.alive}
    tokens = max(0, l_total - site.cached_tokens)
    found = [(moment.loads[site.name].wait_s, made.prefill_s(site.name, tokens), tokens)]
    for server in site.servers:
        if server.role == "prefill" and held.get(server.name, 0) > site.cached_tokens:
            tokens = max(0, l_total - held[server.name])
            found.append((server.wait_s, made.prefill_s(site.name, tokens), tokens))
    return min(found, key=lambda item: item[0] + item[1])


def naive(made: LivePolicy, moment: Moment, seen: Observation, l_total: int) -> float:
    """The least of all pairs, by the definition alone."""
    scores = []
    for home in (site for site in seen.sites if site.role == "pd"):
        wait_s, prefill_s, tokens = serving(made, moment, home, l_total)
        ttfts = [wait_s + prefill_s]
        for far in (site for site in seen.sites if site.role != "pd" and moment.loads[site.name].servers):
            there_s, seconds, missing = serving(made, moment, far, l_total)
            if not seen.bandwidth_scarce:
                own, curve = Serving(missing, there_s, seconds, seconds), made.curve(far.name).at
                least_s, site = moment.loads[far.name].wait_s, msgspec.structs.replace(far)
                fetched = with_fetch(seen, site, own, l_total, least_s, KV, curve)
                there_s, seconds = fetched.wait_s, fetched.seconds
            link = seen.links.get((far.name, home.name))
            exposed_s = made.exposed_s(link, l_total, l_total - tokens, seconds)
            ttfts.append(max(there_s, link.wait_s if link else 0.0) + seconds + exposed_s)
        scores.append(min(ttfts) + DECODE_S_PER_REQUEST * moment.loads[home.name].decode_load)
    return min(scores)


@given(observations(), st.integers(100, 120_000))
@settings(max_examples=120, deadline=None)
def test_no_pair_promises_less_than_the_chosen_one(seen: Observation, l_total: int) -> None:
    made = policy(seen)
    moment = made.look(1.0, seen)
    paths = Paths(KV, {s.name: made.curve(s.name) for s in seen.sites}, [s.name for s in seen.sites if s.role != "pd"])
    home, near, far = paths.best(moment, seen, l_total)
    score_s = min(near.ttft_s, far.ttft_s) + DECODE_S_PER_REQUEST * moment.loads[home].decode_load
    assert score_s == pytest.approx(naive(made, moment, seen, l_total))


CHANGES = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 4), WAITS_S), max_size=25)
ROUTES: tuple[Route | None, ...] = (None, "local", "prfaas")


@given(observations(), CHANGES, st.sampled_from(ROUTES))
@settings(max_examples=120, deadline=None)
def test_what_is_kept_between_changes_decides_as_a_look_at_all_servers(
    seen: Observation, changes: list[tuple[int, int, int, float]], forced: Route | None
) -> None:
    kept, request = LeastLoaded(), RequestView(l_total=30_000, forced=forced)
    for site_number, server_number, kind, wait_s in changes:
        assert decide(seen, request, least=kept) == decide(seen, request)
        site = seen.sites[site_number % len(seen.sites)]
        server = site.servers[server_number % len(site.servers)]
        if kind == 0:
            server.alive = not server.alive
        elif kind == 1:
            server.inflight_requests += 1
        elif kind == 2:
            server.inflight_tokens += 500
        elif kind == 3:
            server.wait_s = wait_s
        else:
            site.cost_s = wait_s
            continue  # about a request, not about a server
        site.version += 1


def test_servers_are_looked_at_again_only_after_a_change() -> None:
    first, second = (ServerView("far", name, "prefill", True) for name in ("a", "b"))
    site, kept = SiteView("far", "prfaas", [first, second]), LeastLoaded()
    assert kept.of(site, "prefill") == [first]
    first.wait_s = 1.0
    assert kept.of(site, "prefill") == [first]
    site.version += 1
    assert kept.of(site, "prefill") == [second]
    second.alive = first.alive = False
    site.version += 1
    assert kept.of(site, "prefill") == []
