"""The live policy: pairs of sites, promises, refusals, and the figures of each decision."""

from __future__ import annotations

import msgspec
import pytest

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.core.request import RequestView
from sglang_prfaas.core.units import gbps_to_bytes_per_s
from sglang_prfaas.scheduler import Decision, Observation, ServerView, SiteView, paper
from sglang_prfaas.scheduler.live import LivePolicy
from sglang_prfaas.scheduler.threshold import NOTHING_OFFLOADED
from sglang_prfaas.scheduler.types import FULL, LinkView

H20, H200, KV = paper.PAPER_PROFILE.prefill["H20"], paper.PAPER_PROFILE.prefill["H200"], paper.PAPER_PROFILE.kv


def link(gbps: float = 100.0, *, backlog_bytes: float = 0.0) -> LinkView:
    rate = gbps_to_bytes_per_s(gbps)
    return LinkView(bytes_per_s=rate, free_bytes_per_s=rate, backlog_bytes=backlog_bytes)


def observation(far: tuple[str, ...] = ("far",), home: tuple[str, ...] = ("home",)) -> Observation:
    sites = [SiteView(name, "prfaas", [ServerView(name, "p", "prefill", True)]) for name in far]
    for name in home:
        servers = [ServerView(name, "l", "prefill", True), ServerView(name, "d", "decode", True)]
        sites.append(SiteView(name, "pd", servers))
    return Observation(sites, 0, links={(a, b): link() for a in far for b in home})


def policy(seen: Observation, **settings: float) -> LivePolicy:
    return LivePolicy(
        kv=KV,
        local={site.name: H20 for site in seen.sites if site.role == "pd"},
        prfaas={site.name: H200 for site in seen.sites if site.role == "prfaas"},
        settings=msgspec.convert({"profile": "paper", **settings}, PolicyConfig),
    )


def server(seen: Observation, site: str, name: str) -> ServerView:
    return next(s for view in seen.sites for s in view.servers if (view.name, s.name) == (site, name))


def ask(made: LivePolicy, seen: Observation, tokens: int, now_s: float = 0.0, **view: object) -> Decision:
    request = msgspec.convert({"l_total": tokens, **view}, RequestView)
    return made.decide(made.look(now_s, seen), seen, request)


def test_a_decision_has_its_figures() -> None:
    seen = observation()
    server(seen, "far", "p").wait_s = 0.25
    decision = ask(policy(seen), seen, 30_000)
    assert decision.route == "prfaas"
    figures = decision.figures
    assert figures is not None
    assert figures.local_ttft_s == pytest.approx(H20.time_s.at(30_000.0))
    state_s = KV.state_bytes / gbps_to_bytes_per_s(100.0)
    assert figures.prfaas_ttft_s == pytest.approx(0.25 + H200.time_s.at(30_000.0) + state_s)
    assert (figures.local_wait_s, figures.prfaas_wait_s, figures.link_gbps) == (0.0, 0.25, 100.0)
    assert "wait 0.25 s PrfaaS, 0.00 s local" in decision.reason
    assert decision.t_tokens == seen.t_tokens


def test_a_link_that_drops_turns_requests_home_at_once() -> None:
    seen = observation()
    made = policy(seen)
    assert ask(made, seen, 30_000).route == "prfaas"
    seen.links[("far", "home")] = link(0.5)
    assert ask(made, seen, 30_000, 0.1).route == "local"
    seen.links[("far", "home")] = link(100.0, backlog_bytes=200e9)
    assert ask(made, seen, 30_000, 0.2).route == "local"
    seen.links[("far", "home")] = link(0.0)
    decision = ask(made, seen, 30_000, 0.3)
    assert (decision.route, decision.t_tokens) == ("local", NOTHING_OFFLOADED)
    assert decision.reason.endswith("the link is down")
    seen.links[("far", "home")] = link()
    assert ask(made, seen, 30_000, 0.4).route == "prfaas"


def test_a_queue_that_surges_turns_requests_to_the_other_path() -> None:
    seen = observation()
    made = policy(seen)
    server(seen, "far", "p").wait_s = 30.0
    assert ask(made, seen, 30_000).route == "local"
    server(seen, "home", "l").wait_s = 30.0
    assert ask(made, seen, 30_000, 0.1).route == "prfaas"


def test_a_dead_prfaas_site() -> None:
    seen = observation()
    made = policy(seen)
    server(seen, "far", "p").alive = False
    decision = ask(made, seen, 100_000)
    assert (decision.route, decision.reason_class) == ("local", "short")
    assert decision.reason.endswith("no PrfaaS server is alive")
    assert decision.figures is not None
    assert decision.figures.prfaas_ttft_s == float("inf")
    server(seen, "far", "p").alive = True
    assert ask(made, seen, 100_000, 1.0).route == "prfaas"


def test_the_best_prfaas_site_over_its_own_link() -> None:
    seen = observation(far=("near", "wide"))
    made = policy(seen)
    seen.links[("near", "home")] = link(1.0)
    decision = ask(made, seen, 60_000)
    assert decision.prefill is server(seen, "wide", "p")
    server(seen, "wide", "p").wait_s = 60.0
    assert ask(made, seen, 60_000, 0.1).prefill is not server(seen, "wide", "p")
    seen.links[("near", "home")] = link(100.0)
    assert ask(made, seen, 60_000, 0.2).prefill is server(seen, "near", "p")


def test_the_best_pd_site_by_what_it_can_expect() -> None:
    seen = observation(home=("a", "b"))
    made = policy(seen)
    server(seen, "a", "l").wait_s = 60.0
    seen.links[("far", "a")] = link(0.1)
    decision = ask(made, seen, 40_000)
    assert (decision.decode, decision.figures and decision.figures.pd_site) == (server(seen, "b", "d"), "b")
    server(seen, "b", "d").alive = False
    assert ask(made, seen, 40_000, 0.1).decode is server(seen, "a", "d")


def test_equal_pd_sites_share_the_load() -> None:
    seen = observation(home=("a", "b"))
    made = policy(seen)
    taken = []
    for step in range(4):
        decode = ask(made, seen, 1_000, step * 0.1).decode
        assert decode is not None
        decode.inflight_requests += 1
        taken.append(decode.site)
    assert taken == ["a", "b", "a", "b"]


def test_a_promise_moves_a_request_that_would_break_it() -> None:
    seen = observation()
    made = policy(seen, slo_ttft_s=3.0)
    server(seen, "far", "p").wait_s = 2.5
    decision = ask(made, seen, 5_000)
    assert decision.route == "local"
    server(seen, "home", "l").wait_s = 0.2
    made = policy(seen, slo_ttft_s=3.0)
    server(seen, "far", "p").wait_s = 0.0
    seen.t_tokens = 0
    server(seen, "home", "l").wait_s = 0.0
    server(seen, "far", "p").wait_s = 1.6
    decision = ask(made, seen, 30_000)
    assert decision.figures is not None
    assert decision.figures.prfaas_ttft_s > 3.0, "neither meets it: the threshold stays"
    assert decision.reason_class in ("short", "long")


def test_slo_is_the_reason_where_it_changes_the_route() -> None:
    seen = observation()
    made = policy(seen, slo_ttft_s=1.2)
    server(seen, "home", "l").wait_s = 1.0
    server(seen, "far", "p").wait_s = 3.0  # w = 3: the threshold takes this for about even
    decision = ask(made, seen, 1_000)
    server(seen, "home", "l").wait_s = 0.3
    server(seen, "far", "p").wait_s = 0.75
    decision = ask(made, seen, 1_500, 0.1)
    assert decision.figures is not None
    assert decision.figures.local_ttft_s < 1.2 < decision.figures.prfaas_ttft_s
    assert decision.route == "local"


def test_beyond_the_longest_wait() -> None:
    seen = observation()
    made = policy(seen, max_wait_s=5.0)
    for name, site in (("l", "home"), ("p", "far")):
        server(seen, site, name).wait_s = 9.0
    decision = ask(made, seen, 30_000)
    assert (decision.route, decision.reason_class, decision.retry_after_s) == (None, "busy_prefill", 4.0)
    assert ask(made, seen, 30_000, 0.1, avoid=[("far", "p")]).route is not None, "it was let in"
    server(seen, "far", "p").wait_s = 4.0
    assert ask(made, seen, 30_000, 0.2, forced="local").reason_class == "busy_prefill"
    assert ask(made, seen, 10, 0.2).route == "prfaas"
    server(seen, "far", "p").alive = False
    assert ask(made, seen, 30_000, 0.3).reason_class == "busy_prefill", "all local, and beyond local capacity"


def test_full_decode_servers() -> None:
    seen = observation()
    made = policy(seen)
    seen.max_decode_requests = 3
    server(seen, "home", "d").inflight_requests = 3
    decision = ask(made, seen, 100)
    assert (decision.route, decision.reason_class, decision.retry_after_s) == (None, "busy_decode", 1.0)
    assert "policy.max_decode_requests" in decision.reason
    server(seen, "home", "d").inflight_requests = 0
    server(seen, "home", "d").extra_load = FULL
    assert "KV" in ask(made, seen, 100, 0.1).reason


def test_cached_prefixes_count_on_their_own_path() -> None:
    seen = observation()
    made = policy(seen)
    seen.sites[1].cached_tokens = 29_900
    decision = ask(made, seen, 30_000)
    assert decision.figures is not None
    assert (decision.figures.local_tokens, decision.figures.prfaas_tokens) == (100, 30_000)
    assert (decision.route, decision.uncached_tokens) == ("local", 100)


def test_a_server_with_the_prefix_is_taken_while_its_queue_is_worth_it() -> None:
    seen = observation()
    seen.sites[0].servers.append(ServerView("far", "q", "prefill", True))
    seen.sites[0].affinity = {"q": 40_000}
    made = policy(seen)
    server(seen, "far", "q").wait_s = 0.1
    assert ask(made, seen, 60_000).prefill is server(seen, "far", "q")
    server(seen, "far", "q").wait_s = 30.0
    assert ask(made, seen, 60_000, 0.1).prefill is server(seen, "far", "p")


def test_what_prefills_take_is_learnt() -> None:
    seen = observation()
    made = policy(seen)
    before = ask(made, seen, 30_000).figures
    for step in range(60):
        made.learn(step * 0.1, "far", 30_000.0, 3 * H200.time_s.at(30_000.0))
    after = ask(made, seen, 30_000, 20.0).figures
    assert before is not None
    assert after is not None
    assert after.prfaas_ttft_s == pytest.approx(3 * before.prfaas_ttft_s, rel=0.15)
    assert after.local_ttft_s == before.local_ttft_s
