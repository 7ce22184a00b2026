"""A longer prefix against a longer queue."""

from __future__ import annotations

import pytest

from sglang_prfaas.core.request import RequestView
from sglang_prfaas.scheduler.affinity import best_serving
from sglang_prfaas.scheduler.short_term import decide
from sglang_prfaas.scheduler.types import Observation, ServerView, SiteView


def prefill_s(tokens: float) -> float:
    """Slower for each token of a longer prompt, as attention makes it."""
    return tokens / 1000 + tokens * tokens / 1e8


def site(waits: dict[str, float], **held: int) -> SiteView:
    servers = [ServerView("home", name, "prefill", alive=True, wait_s=wait) for name, wait in waits.items()]
    decode = ServerView("home", "d", "decode", alive=True)
    return SiteView("home", "pd", [*servers, decode], affinity=held)


def chosen(view: SiteView, l_total: int = 10_000) -> str:
    decision = decide(Observation([view], t_tokens=1 << 30), RequestView(l_total=l_total))
    assert decision.prefill is not None
    return decision.prefill.name


@pytest.mark.parametrize(
    ("wait_s", "server"),
    [(0.0, "holder"), (8.8, "holder"), (9.2, "other")],  # 9,000 of 10,000 tokens save 11.00 s - 1.01 s = 9.99 s
)
def test_the_holder_serves_until_its_queue_costs_more_than_its_prefix_saves(wait_s: float, server: str) -> None:
    view = site({"holder": wait_s + 1.0, "other": 0.0}, holder=9000)
    serving = best_serving(view, 10_000, 0.0, prefill_s)
    assert view.saved_s == {"holder": pytest.approx(9.99)}
    assert chosen(view) == server
    assert serving.tokens == (1000 if server == "holder" else 10_000)
    assert serving.wait_s == (wait_s + 1.0 if server == "holder" else 0.0)
    assert serving.wait_s + serving.seconds == pytest.approx(min(wait_s + 1 + prefill_s(1000), prefill_s(10_000)))


def test_of_two_holders_the_sooner_one_serves() -> None:
    view = site({"long": 5.0, "short": 0.0, "none": 0.0}, long=9000, short=8000)
    assert best_serving(view, 10_000, 0.0, prefill_s).tokens == 2000
    assert chosen(view) == "short"


def test_a_dead_holder_saves_nothing() -> None:
    view = site({"holder": 0.0, "other": 1.0}, holder=9000)
    view.servers[0].alive = False
    serving = best_serving(view, 10_000, 1.0, prefill_s)
    assert (serving.tokens, serving.wait_s, view.saved_s) == (10_000, 1.0, {})


def test_a_decode_server_with_the_prefix_may_have_one_request_more() -> None:
    view = site({"p": 0.0})
    view.servers.append(ServerView("home", "e", "decode", alive=True))
    view.decode_affinity = {"e": 500}

    def decode() -> str:
        found = decide(Observation([view], t_tokens=1 << 30), RequestView(l_total=1000)).decode
        assert found is not None
        return found.name

    assert decode() == "e"
    view.servers[-1].inflight_requests = 1
    assert decode() == "e"
    view.servers[-1].inflight_requests = 2
    assert decode() == "d"
