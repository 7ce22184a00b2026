"""The live role loop over reports."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.config.schema import RolesConfig
from sglang_prfaas.monitor.reports import LinkLoad, ServerLoad
from sglang_prfaas.router.role_loop import LoadMeans, RequestTally, RoleLoop, RoleResult, observe
from sglang_prfaas.scheduler import ServerView, SiteView
from sglang_prfaas.scheduler.long_term import RolePolicy
from sglang_prfaas.scheduler.role_capacity import MeasuredCapacity
from sglang_prfaas.scheduler.types import ServerRole

DECODE_IS_FULL = [
    ServerLoad(server="p0", busy_fraction=0.1, prefill_tokens_per_s=1000.0),
    ServerLoad(server="p1", busy_fraction=0.1, prefill_tokens_per_s=1000.0, waiting_uncached_tokens=6000),
    ServerLoad(
        server="d0",
        running=20,
        waiting=4,
        prealloc=6,
        kv_tokens_used=90,
        kv_tokens_total=100,
        busy_fraction=0.5,
        decode_tokens_per_s=200.0,
    ),
]


def site() -> SiteView:
    servers = [ServerView("pd", "p0", "prefill", True, 2), ServerView("pd", "p1", "prefill", True, 1)]
    return SiteView("pd", "pd", [*servers, ServerView("pd", "d0", "decode", True, 30)])


class Loads:
    def __init__(self, loads: Sequence[ServerLoad]) -> None:
        self.now = loads

    def server(self, site: str, name: str) -> ServerLoad | None:
        assert site == "pd"
        return next((load for load in self.now if load.server == name), None)

    def link(self, from_site: str, to_site: str) -> LinkLoad | None:
        return None


class Commander:
    def __init__(self, result: RoleResult | Exception) -> None:
        self.result, self.commands = result, list[tuple[str, str, ServerRole]]()

    async def switch(self, site: str, server: str, role: ServerRole) -> RoleResult:
        self.commands.append((site, server, role))
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def loop(commander: Commander, source: Loads, clock: VirtualClock, tally: RequestTally) -> RoleLoop:
    policy = RolePolicy(MeasuredCapacity(), RolesConfig(confirm=1))
    it = RoleLoop(
        site=site(), others=[], policy=policy, source=source, commander=commander, clock=clock, interval_s=60.0
    )
    it.tally = tally
    return it


def busy_tally() -> RequestTally:
    tally = RequestTally()
    for _ in range(120):
        tally.arrived(100)
    return tally


def test_what_the_policy_sees() -> None:
    far = SiteView("far", "prfaas", [ServerView("far", "a", "prefill", True), ServerView("far", "b", "prefill")])
    seen = observe(site(), [far], DECODE_IS_FULL, busy_tally(), now_s=5.0, interval_s=60.0, link_gbps=10.0)
    assert seen is not None
    load = seen.load
    assert (load.n_p, load.n_d, load.n_prfaas, load.link_gbps) == (2, 1, 1, 10.0)
    assert (load.arrival_rate, load.output_tokens, len(load.lengths)) == (2.0, 50.0, 120)
    assert (load.prefill_busy, load.decode_busy) == pytest.approx((0.1, 0.9))
    assert (load.prefill_queued, load.decode_queued) == pytest.approx((0.05, 0.5))
    assert [server.inflight_requests for server in seen.servers] == [2, 1, 30]


def test_a_command_is_carried_out_and_its_result_counts() -> None:
    for succeeded, rest in ((True, "possible in 60 s"), (False, "possible in 240 s")):
        commander, clock, tally = Commander(RoleResult(succeeded)), VirtualClock(), busy_tally()
        running = loop(commander, Loads(DECODE_IS_FULL), clock, tally)
        assert asyncio.run(running.look()) is not None
        assert commander.commands == [("pd", "p1", "decode")]
        (made,) = running.decisions
        assert (made.command is not None, made.result) == (True, RoleResult(succeeded))
        assert made.load is not None
        assert (made.load.n_p, made.load.n_d) == (2, 1)
        assert running.changes == {("pd", "decode", "done" if succeeded else "failed"): 1}
        clock.advance(60.0)
        assert asyncio.run(running.look()) is None
        assert rest in running._policy.reason


def test_without_fresh_reports_nothing_is_decided() -> None:
    commander, clock, tally = Commander(RoleResult(True)), VirtualClock(), busy_tally()
    running = loop(commander, Loads(DECODE_IS_FULL[:2]), clock, tally)
    assert asyncio.run(running.look()) is None
    assert commander.commands == []
    assert "d0" in running.decisions[-1].reason


def test_a_commander_that_fails_does_not_block_later_switches() -> None:
    commander, clock, tally = Commander(OSError("gone")), VirtualClock(), busy_tally()
    running = loop(commander, Loads(DECODE_IS_FULL), clock, tally)
    with pytest.raises(OSError, match="gone"):
        asyncio.run(running.look())
    clock.advance(301.0)
    tally.arrived(100)
    commander.result = RoleResult(True)
    for _ in range(1000):
        tally.arrived(100)
    assert asyncio.run(running.look()) is not None


def test_means_are_of_the_role_that_a_server_has_now() -> None:
    means = LoadMeans()
    for role, busy, running in (("prefill", 1.0, 9), ("decode", 0.2, 4), ("decode", 0.6, 7)):
        means.add(ServerLoad(server="a", role=role, busy_fraction=busy, running=running))
    (load,) = means.take()
    assert (load.role, load.running) == ("decode", 6)
    assert load.busy_fraction == pytest.approx(0.4)
    assert means.take() == []


def test_work_that_waits_in_the_router_is_work_for_prefill() -> None:
    seen = observe(site(), [], DECODE_IS_FULL, busy_tally(), now_s=5.0, interval_s=60.0, held_s=60.0)
    assert seen is not None
    assert seen.load.prefill_queued == pytest.approx(0.05 + 0.5)
