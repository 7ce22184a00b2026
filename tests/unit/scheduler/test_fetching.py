"""What the live policy expects of a PrfaaS site that fetches a prefix from the PD site."""

from __future__ import annotations

import msgspec
import pytest

from sglang_prfaas.core.units import gbps_to_bytes_per_s
from sglang_prfaas.scheduler import Observation
from sglang_prfaas.scheduler.types import Figures, LinkView

from .test_live import H200, KV, ask, link, observation, policy, server

TOTAL, HELD = 60_000, 40_000


def seen_with(prefix: dict[str, int], through: LinkView, *, scarce: bool = False) -> Observation:
    seen = observation()
    seen.bandwidth_scarce = scarce
    seen.links[("far", "home")] = through
    for site in seen.sites:
        site.cached_tokens = prefix.get(site.name, 0)
    return seen


def expected(seen: Observation) -> Figures:
    figures = ask(policy(seen), seen, TOTAL).figures
    assert figures is not None
    return figures


def curve(tokens: int) -> float:
    return H200.time_s.at(float(tokens))


STATE_S = KV.state_bytes / gbps_to_bytes_per_s(100.0)


def test_a_fetched_prefix_costs_its_transfer_and_the_rest() -> None:
    figures = expected(seen_with({"home": HELD}, link()))
    fetch_s = KV.size_bytes(HELD) / gbps_to_bytes_per_s(100.0)
    assert figures.prfaas_tokens == TOTAL - HELD
    assert figures.prfaas_ttft_s == pytest.approx(fetch_s + curve(TOTAL - HELD) + STATE_S)


def test_only_what_the_site_lacks_is_fetched() -> None:
    figures = expected(seen_with({"home": HELD, "far": HELD // 2}, link()))
    fetch_s = KV.increment_bytes(HELD, HELD // 2) / gbps_to_bytes_per_s(100.0)
    assert figures.prfaas_ttft_s == pytest.approx(fetch_s + curve(TOTAL - HELD) + STATE_S)


def test_what_would_not_be_fetched_is_computed() -> None:
    """The link is scarce, slow, far away, or the site has more itself."""
    whole, slow = link(), link(1.0)
    for seen, tokens in (
        (seen_with({"home": HELD}, whole, scarce=True), TOTAL),
        (seen_with({"home": HELD}, slow), TOTAL),
        (seen_with({"home": HELD}, msgspec.structs.replace(whole, rtt_s=60.0)), TOTAL),
        (seen_with({"home": HELD, "far": HELD + 512}, whole), TOTAL - HELD - 512),
    ):
        assert expected(seen).prfaas_tokens == tokens


def test_a_holder_saves_less_where_the_others_fetch() -> None:
    seen = seen_with({"home": HELD}, link())
    far = next(site for site in seen.sites if site.name == "far")
    far.affinity = {"p": 8_192}
    server(seen, "far", "p").wait_s = 0.0
    expected(seen)
    assert far.saved_s.get("p", 0.0) < curve(TOTAL) - curve(TOTAL - 8_192)
