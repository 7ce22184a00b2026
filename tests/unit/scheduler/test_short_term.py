"""The per-request decision."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.core.request import RequestView
from sglang_prfaas.scheduler import Observation, ServerView, SiteView, decide, uncached_length
from sglang_prfaas.scheduler.types import ServerRole


def server(
    site: str, name: str, role: ServerRole, *, alive: bool = True, requests: int = 0, tokens: int = 0
) -> ServerView:
    return ServerView(site, name, role, alive, requests, tokens)


def observation(
    far: list[ServerView] | None = None, home: list[ServerView] | None = None, *, t: int = 100
) -> Observation:
    far = [server("far", "p", "prefill")] if far is None else far
    home = [server("home", "l", "prefill"), server("home", "d", "decode")] if home is None else home
    return Observation([SiteView("far", "prfaas", far), SiteView("home", "pd", home)], t)


@pytest.mark.parametrize(("length", "route", "reason_class"), [(100, "local", "short"), (101, "prfaas", "long")])
def test_the_threshold_divides(length: int, route: str, reason_class: str) -> None:
    decision = decide(observation(), RequestView(l_total=length))
    assert decision.route == route
    assert decision.reason_class == reason_class
    assert decision.reason == f"uncached {length} {'>' if route == 'prfaas' else '<='} t 100"
    assert decision.prefill is not None
    assert decision.prefill.site == ("far" if route == "prfaas" else "home")
    assert decision.decode is not None
    assert decision.decode.name == "d"


def test_an_estimate_says_so() -> None:
    assert decide(observation(), RequestView(l_total=5, exact=False)).reason == "uncached about 5 <= t 100"


def test_cached_tokens_count_by_bandwidth() -> None:
    seen = observation()
    seen.sites[0].cached_tokens = 80
    seen.sites[1].cached_tokens = 30
    request = RequestView(l_total=150)
    assert uncached_length(seen, request) == 120  # l_total - l_pd
    assert decide(seen, request).route == "prfaas"
    seen.bandwidth_scarce = False
    assert uncached_length(seen, request) == 70  # l_total - max(l_prfaas, l_pd)
    assert decide(seen, request).route == "local"


def test_least_loaded() -> None:
    far = [
        server("far", "a", "prefill", tokens=500),
        server("far", "b", "prefill", requests=9, tokens=100),
        server("far", "c", "prefill", alive=False),
    ]
    home = [server("home", "d1", "decode", requests=2), server("home", "d2", "decode", requests=1)]
    decision = decide(observation(far, home), RequestView(l_total=1000))
    assert decision.prefill is far[1]
    assert decision.decode is home[1]


def test_equal_servers_take_turns() -> None:
    far = [server("far", n, "prefill") for n in "abc"]
    taken = []
    for _ in range(6):
        chosen = decide(observation(far), RequestView(l_total=1000)).prefill
        assert chosen is not None
        chosen.served += 1
        taken.append(chosen.name)
    assert taken == ["a", "b", "c"] * 2


def test_each_side_falls_back_on_the_other() -> None:
    decision = decide(observation(far=[]), RequestView(l_total=1000))
    assert (decision.route, decision.reason_class) == ("local", "no_prfaas")
    assert decision.reason == "uncached 1000 > t 100, but no PrfaaS prefill server is alive"
    decision = decide(observation(home=[server("home", "d", "decode")]), RequestView(l_total=1))
    assert (decision.route, decision.reason_class) == ("prfaas", "no_local")


def test_servers_that_failed_are_left_out_while_there_are_others() -> None:
    far = [server("far", "a", "prefill"), server("far", "b", "prefill")]
    request = RequestView(l_total=1000, avoid=frozenset({("far", "a")}))
    assert decide(observation(far), request).prefill is far[1]
    request = RequestView(l_total=1000, avoid=frozenset({("far", "a"), ("far", "b")}))
    decision = decide(observation(far), request)
    assert decision.route == "local"
    assert "every PrfaaS prefill server failed for this request" in decision.reason
    request = RequestView(l_total=1000, avoid=request.avoid | {("home", "l"), ("home", "d")})
    decision = decide(observation(far), request)
    assert decision.route == "prfaas"
    assert decision.reason.endswith("tried again")
    assert decision.decode is not None


def test_forced_routes_do_not_fall_back() -> None:
    assert decide(observation(), RequestView(l_total=1, forced="prfaas")).route == "prfaas"
    assert decide(observation(), RequestView(l_total=1000, forced="local")).route == "local"
    decision = decide(observation(far=[]), RequestView(l_total=1, forced="prfaas"))
    assert decision.route is None
    assert decision.reason == "route prfaas was forced, but no PrfaaS prefill server is alive"


def test_nothing_alive() -> None:
    assert decide(observation(home=[]), RequestView(l_total=1)).reason_class == "no_decode"
    assert decide(observation([], [server("home", "d", "decode")]), RequestView(l_total=1)).reason_class == "no_prefill"


def test_decode_of_a_prfaas_site_is_not_used() -> None:
    far = [server("far", "p", "prefill"), server("far", "x", "decode")]
    assert (
        decide(observation(far, [server("home", "l", "prefill")]), RequestView(l_total=1)).reason_class == "no_decode"
    )


servers = st.lists(
    st.tuples(st.sampled_from(["prefill", "decode"]), st.booleans(), st.integers(0, 5), st.integers(0, 5)), max_size=4
)


@given(servers, servers, st.integers(0, 200), st.sampled_from([None, "local", "prfaas"]), st.sets(st.integers(0, 7)))
def test_a_decision_names_alive_servers_of_the_right_role_and_changes_nothing(
    far: list[tuple[ServerRole, bool, int, int]],
    home: list[tuple[ServerRole, bool, int, int]],
    length: int,
    forced: object,
    avoid: set[int],
) -> None:
    lists = [
        [
            server(site, f"{site}{i}", role, alive=alive, requests=n, tokens=m)
            for i, (role, alive, n, m) in enumerate(rows)
        ]
        for site, rows in (("far", far), ("home", home))
    ]
    seen = observation(*lists)
    everything = [s for rows in lists for s in rows]
    keys = frozenset(s.key for i, s in enumerate(everything) if i in avoid)
    before = repr(seen)
    decision = decide(seen, RequestView(l_total=length, forced=forced, avoid=keys))  # type: ignore[arg-type]
    assert repr(seen) == before
    assert decision.reason
    prefills = [s for s in everything if s.alive and s.role == "prefill"]
    decodes = [s for s in lists[1] if s.alive and s.role == "decode"]
    if decision.route is None:
        assert not decodes or not prefills or forced is not None
        return
    assert decision.prefill in prefills
    assert decision.decode in decodes
    assert decision.prefill is not None
    assert decision.prefill.site == ("far" if decision.route == "prfaas" else "home")
    assert forced in (None, decision.route)


@given(
    loads=st.lists(
        st.tuples(st.booleans(), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=8
    ),
    avoided=st.sets(st.integers(0, 7)),
)
def test_the_prefill_server_that_is_free_first(loads: list[tuple[bool, int, int, int]], avoided: set[int]) -> None:
    far = [server("far", f"p{index}", "prefill", alive=load[0], tokens=load[2]) for index, load in enumerate(loads)]
    for view, (_, wait_s, _, served) in zip(far, loads, strict=True):
        view.wait_s, view.served = float(wait_s), served
    avoid = frozenset(("far", f"p{index}") for index in avoided)
    decision = decide(observation(far), RequestView(l_total=500, avoid=avoid))
    usable = [view for view in far if view.alive and view.key not in avoid]
    if not usable:
        assert decision.reason_class == "no_prfaas"
        assert decision.route == "local"
        return
    best = min(usable, key=lambda view: (view.wait_s, view.inflight_tokens, view.served, view.name))
    assert decision.prefill is best
