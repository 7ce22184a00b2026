"""When a request's bytes go over the inner rail."""

from __future__ import annotations

from sglang_prfaas.sglang_plugin.inner_rail.choice import takes_rail
from sglang_prfaas.transport.messages import InnerRail, RankInfo


def rank(kind: str = "mooncake", site: str = "pd", tp_rank: int = 0) -> RankInfo:
    return RankInfo(0, tp_rank, 0, "", 7000, InnerRail(kind, site, "10.0.0.1", 9000))


def test_prefill_of_the_own_site_with_the_same_rail() -> None:
    assert takes_rail("mooncake", "pd", [rank()], [""])
    assert takes_rail("mooncake", "pd", [rank(), rank(tp_rank=1)], ["pd", "pd"])


def test_prefill_of_another_site_or_without_it() -> None:
    assert not takes_rail("mooncake", "pd", [RankInfo(0, 0, 0, "", 7000)], ["pd"])
    assert not takes_rail("mooncake", "pd", [rank(site="prfaas")], [""])
    assert not takes_rail("mooncake", "pd", [rank(kind="nixl")], ["pd"])
    assert not takes_rail("mooncake", "pd", [rank(), RankInfo(0, 1, 0, "", 7002)], ["pd", "pd"])
    assert not takes_rail("mooncake", "pd", [], [])


def test_pages_of_another_size() -> None:
    assert takes_rail("mooncake", "pd", [rank()], [""], (16, 16))
    assert not takes_rail("mooncake", "pd", [rank()], [""], (16, 64))


def test_a_rank_that_only_claims_to_be_of_this_site() -> None:
    assert not takes_rail("mooncake", "pd", [rank()], ["prfaas"])
    assert not takes_rail("mooncake", "pd", [rank(), rank(tp_rank=1)], ["pd", "prfaas"])
