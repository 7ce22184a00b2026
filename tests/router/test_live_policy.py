"""The live policy in a router with real sockets: what it sees moves requests, and it says why."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.config.schema import AgentConfig, LinkConfig, PolicyConfig, ReportsConfig
from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.monitor.reports import LinkLoad, ServerLoad
from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.prefixes import NoPrefixes
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.profiles import PrefillProfile, ProfileFile, save_profile
from sglang_prfaas.scheduler.types import SitePrefix
from tests.lateness import lateness
from tests.router.pd_fakes import Cluster, cluster, header, run, until

REACTION_S = 1.0
LINK_BYTES_PER_S = 125e6


def line(seconds_per_token: float) -> PrefillProfile:
    return PrefillProfile(time_s=Curve((0.0, 1e6), (0.0, seconds_per_token * 1e6)), gpus=1, origin="for this test")


PROFILE = ProfileFile(
    model="words",
    # 1.1 s of state over the link: offloading pays from 25 tokens on, where nothing waits
    kv=KvLayout(full_bytes_per_token=1000.0, state_bytes=1.1 * LINK_BYTES_PER_S),
    prefill={"slow": line(0.05), "quick": line(0.005)},
    decode={},
)


class Reports:
    """A load source that a test writes."""

    def __init__(self) -> None:
        self.servers: dict[tuple[str, str], ServerLoad] = {}
        self.links: dict[tuple[str, str], LinkLoad] = {}

    def server(self, site: str, name: str) -> ServerLoad | None:
        return self.servers.get((site, name))

    def link(self, from_site: str, to_site: str) -> LinkLoad | None:
        return self.links.get((from_site, to_site))

    def carries(self, bytes_per_s: float, **more: Any) -> None:
        self.links[("far", "home")] = LinkLoad(
            from_site="far", to_site="home", capacity_bytes_per_s=bytes_per_s, **more
        )


class Index(NoPrefixes):
    """A prefix lookup that a test writes."""

    def __init__(self) -> None:
        self.held: dict[str, SitePrefix] = {}

    def match(self, body: ParsedBody) -> dict[str, SitePrefix]:
        return self.held


@contextlib.asynccontextmanager
async def live(
    tmp_path: Path, reports: Reports | None = None, index: Index | None = None, **settings: Any
) -> AsyncIterator[Cluster]:
    profile = tmp_path / "profile.json"
    save_profile(PROFILE, profile)
    settings = {"correct_profile": False, **settings}
    async with cluster(
        policy=PolicyConfig(profile=str(profile), threshold_tokens=10, **settings),
        hardware={"far": "quick", "home": "slow"},
        links={"far": [LinkConfig(to_site="home", capacity_gbps=1.0)]},
        loads=reports,
        prefixes=index,
    ) as c:
        yield c


async def long_route(c: Cluster) -> str:
    answer = await c.long()
    assert answer.status == 200
    return header(answer, "x-prfaas-route")


async def becomes(c: Cluster, route: str) -> float:
    """Seconds until long requests take this route, without those in which this process did not run."""
    start_s = time.monotonic()
    with lateness() as late_s:
        async with asyncio.timeout(30):
            while await long_route(c) != route:
                pass
        return time.monotonic() - start_s - late_s()


async def get(c: Cluster, target: str) -> Any:
    answer = await c.request(target, method="GET")
    assert answer.status == 200
    return json.loads(answer.body)


def test_headers_and_the_decisions_endpoint(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path) as c:
            short, long = await c.short(), await c.long(x_request_id="mine")
            assert (header(short, "x-prfaas-route"), header(long, "x-prfaas-route")) == ("local", "prfaas")
            assert header(short, "x-prfaas-reason").startswith(
                "uncached 3 <= t 24; t* 10, rho 0.00, wait 0.00 s PrfaaS"
            )
            assert header(long, "x-prfaas-reason").startswith("uncached 51 > t 24; ")
            assert float(header(short, "x-prfaas-expected-ttft-ms")) == pytest.approx(150.0)
            assert float(header(long, "x-prfaas-expected-ttft-ms")) == pytest.approx(1355.0)
            await until(lambda: b'"status":200' in c.router.proxy.decisions.render(1), "the last one has ended")
            decisions = (await get(c, "/decisions"))["decisions"]
            assert [d["route"] for d in decisions] == ["prfaas", "local"]
            newest = decisions[0]
            assert (newest["id"], newest["prefill"], newest["decode"]) == ("mine", "far/p", "home/d")
            assert (newest["reason_class"], newest["t_tokens"], newest["uncached_tokens"]) == ("long", 24, 51)
            assert newest["ttft_s"] > 0
            assert newest["figures"]["local_ttft_s"] == pytest.approx(2.55)
            assert newest["figures"]["prfaas_tokens"] == 51
            assert len((await get(c, "/decisions?newest=1"))["decisions"]) == 1
            assert (await c.request("/decisions?newest=x", method="GET")).status == 400
            policy = await get(c, "/policy")
            assert policy["mode"] == "live"
            assert policy["thresholds"]["home"]["t_tokens"] == 24
            assert policy["sites"]["home"]["link_gbps"] == 1.0
            assert policy["profile"]["sites"] == {"far": "for this test", "home": "for this test"}
            assert {(s["server"], s["wait_s"]) for s in policy["prefill"]} == {("p", 0.0), ("l", 0.0)}
            metrics = (await c.request("/metrics", method="GET")).body.decode()
            assert 'prfaas_router_policy_threshold_tokens{site="home"} 24' in metrics
            assert 'prfaas_router_link_bytes_per_second{from="far",to="home"} 1.25e+08' in metrics

    run(main)


def test_a_link_that_drops_sends_requests_home_within_a_second_and_back(tmp_path: Path) -> None:
    async def main() -> None:
        reports = Reports()
        async with live(tmp_path, reports) as c:
            assert await long_route(c) == "prfaas"
            reports.carries(1e6)
            assert await becomes(c, "local") < REACTION_S
            policy = await get(c, "/policy")
            assert policy["links"][0]["measured"]
            assert policy["thresholds"]["home"]["t_tokens"] > 51
            reports.carries(LINK_BYTES_PER_S)
            assert await becomes(c, "prfaas") < REACTION_S
            reports.carries(LINK_BYTES_PER_S, backlog_bytes=int(10 * LINK_BYTES_PER_S))
            assert await becomes(c, "local") < REACTION_S
            reports.carries(LINK_BYTES_PER_S, used_bytes_per_s=2e6, congested=True)
            assert await becomes(c, "local") < REACTION_S

    run(main)


def test_stale_reports_are_not_trusted(tmp_path: Path) -> None:
    async def main() -> None:
        reports = Reports()
        async with live(tmp_path, reports) as c:
            reports.carries(1e6, age_s=5.0)
            reports.servers[("far", "p")] = ServerLoad(server="p", waiting=9, waiting_uncached_tokens=9000, age_s=5.0)
            assert await long_route(c) == "prfaas"
            assert not (await get(c, "/policy"))["links"][0]["measured"]
            reports.servers[("far", "p")] = ServerLoad(server="p", waiting=9, waiting_uncached_tokens=9000)
            assert await becomes(c, "local") < REACTION_S, "18 s of work, sent by others"

    run(main)


def test_a_report_that_is_two_late_is_still_trusted(tmp_path: Path) -> None:
    """Decode's figures are up to 0.7 s old when an agent sends them, and two reports may be lost."""
    oldest_s = 0.7 + 3 * AgentConfig().report_interval_s

    async def main() -> None:
        reports = Reports()
        async with live(tmp_path, reports) as c:
            reports.carries(1e6, age_s=oldest_s)
            assert await becomes(c, "local") < REACTION_S
            assert (await get(c, "/policy"))["links"][0]["measured"]

    assert oldest_s < PolicyConfig().staleness_s <= ReportsConfig().stale_after_s
    run(main)


def test_a_queue_that_surges_moves_the_threshold(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path) as c:
            gate = c["p"].gate = asyncio.Event()
            burst = [asyncio.create_task(c.long(x_prfaas_route="prfaas")) for _ in range(20)]
            line = c.router.policy.line
            assert line is not None
            await until(lambda: len(c["p"].bodies) + len(line) == 20, "as much as the link carries is in prefill")
            assert len(c["p"].bodies) > 1
            assert await becomes(c, "local") < REACTION_S
            policy = await get(c, "/policy")
            assert policy["thresholds"]["home"]["t_tokens"] > 51
            assert next(s for s in policy["prefill"] if s["server"] == "p")["requests"] == len(c["p"].bodies)
            gate.set()
            await asyncio.gather(*burst)
            assert await becomes(c, "prfaas") < REACTION_S
            await until(lambda: all(len(t.queue) == 0 for t in c.router.registry.targets()), "nothing is left behind")

    run(main)


def test_a_prefill_server_that_hangs_is_left_alone(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path) as c:
            c["p"].gate = asyncio.Event()
            stuck = asyncio.create_task(c.long())
            await c["p"].started.wait()
            await until(
                lambda: c.router.policy.describe(c.router.client.loop.time())["thresholds"]["home"].t_tokens > 51,
                "its silence moves the threshold",
            )
            assert await long_route(c) == "local"
            c["p"].gate.set()
            assert (await stuck).status == 200

    run(main)


def test_a_dead_prfaas_site_and_back(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path) as c:
            assert await long_route(c) == "prfaas"
            port = c["p"].port
            await c["p"].stop()
            answer = await c.long()  # at once, whether a health check has noticed or not
            assert (answer.status, header(answer, "x-prfaas-route")) == (200, "local")
            await until(lambda: c.down("p"), "p down")
            assert "no PrfaaS" in header(await c.long(), "x-prfaas-reason")
            await c["p"].listen(port)
            await c.all_up()
            assert await becomes(c, "prfaas") < REACTION_S

    run(main)


def test_beyond_the_longest_wait_requests_are_answered_429(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, max_wait_s=6.0) as c:
            await c["p"].stop()
            await until(lambda: c.down("p"), "p down")
            gate = c["l"].gate = asyncio.Event()
            burst = [asyncio.create_task(c.long()) for _ in range(5)]  # 2.55 s of work each
            await until(lambda: len(c["l"].bodies) >= 3, "local prefill has all it may")
            refused = await c.long()
            assert refused.status == 429
            assert int(header(refused, "retry-after")) >= 1
            error = json.loads(refused.body)["error"]
            assert error["code"] == "busy_prefill"
            assert "policy.max_wait_s = 6" in error["message"]
            gate.set()
            assert {answer.status for answer in await asyncio.gather(*burst)} == {200, 429}
            assert (await c.long()).status == 200

    run(main)


def test_full_decode_servers_refuse_with_a_fixed_threshold_too() -> None:
    async def main() -> None:
        async with cluster(policy=PolicyConfig(threshold_tokens=10, max_decode_requests=2)) as c:
            gate = c["l"].gate = asyncio.Event()
            both = [asyncio.create_task(c.short()) for _ in range(2)]
            await until(lambda: len(c["l"].bodies) == 2, "decode has all it may")
            refused = await c.short()
            assert (refused.status, header(refused, "retry-after")) == (429, "1")
            gate.set()
            assert [answer.status for answer in await asyncio.gather(*both)] == [200, 200]
            assert (await c.short()).status == 200
            assert (await get(c, "/policy"))["mode"] == "fixed"
            assert {d["status"] for d in (await get(c, "/decisions"))["decisions"]} == {200, 429}

    run(main)


def test_decode_servers_are_chosen_by_their_reports(tmp_path: Path) -> None:
    async def main() -> None:
        reports = Reports()
        profile = tmp_path / "profile.json"
        save_profile(PROFILE, profile)
        async with cluster(
            decode=("d1", "d2"),
            policy=PolicyConfig(profile=str(profile), max_kv_occupancy=0.9),
            hardware={"far": "quick", "home": "slow"},
            links={"far": [LinkConfig(to_site="home", capacity_gbps=1.0)]},
            loads=reports,
        ) as c:
            reports.servers[("home", "d1")] = ServerLoad(server="d1", prealloc=3, running=9)
            for _ in range(3):
                assert header(await c.short(), "x-prfaas-decode") == "home/d2"
            full = ServerLoad(server="d2", kv_tokens_used=95, kv_tokens_total=100)
            reports.servers[("home", "d2")] = full
            await until(lambda: c.router.policy.describe(c.router.client.loop.time()) is not None, "a new look")
            assert header(await c.short(), "x-prfaas-decode") == "home/d1"

    run(main)


def test_cached_prefixes_reach_the_decision(tmp_path: Path) -> None:
    async def main() -> None:
        index = Index()
        async with live(tmp_path, index=index) as c:
            index.held = {"home": SitePrefix(48)}
            answer = await c.long()
            assert header(answer, "x-prfaas-route") == "local"
            assert header(answer, "x-prfaas-uncached-tokens") == "3"
            index.held = {}
            assert header(await c.long(), "x-prfaas-uncached-tokens") == "51"

    run(main)


def test_prefill_times_correct_the_profile(tmp_path: Path) -> None:
    async def main() -> None:
        async with live(tmp_path, correct_profile=True) as c:
            for _ in range(12):
                assert (await c.long(x_prfaas_route="local")).status == 200

            def learnt() -> dict[int, float]:
                policy: Any = c.router.policy
                policy.live.correction.fade(c.router.client.loop.time())
                return policy.live.correction.table().get("home", {})

            await until(lambda: learnt().get(32, 1.0) < 0.5, "fakes take no second for 51 words")
            assert (await get(c, "/policy"))["profile"]["correction"]["home"]["32"] < 0.5

    run(main)
