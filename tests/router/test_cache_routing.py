"""Routing by what is cached, with real ZeroMQ events: the server that holds a prefix, load, stale entries, tenants."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.config.schema import LinkConfig, PolicyConfig, PrefixIndexConfig, TenancyConfig, TenantConfig
from sglang_prfaas.http import FetchedResponse, Request, Response
from sglang_prfaas.prefix_cache.block_hash import Namespace
from sglang_prfaas.prefix_cache.matching import Holder
from sglang_prfaas.router.body import parse_body
from sglang_prfaas.router.prefix_lookup import PrefixIndex
from sglang_prfaas.scheduler.profiles import save_profile

from .kv_publisher import KvPublisher
from .pd_fakes import Cluster, cluster, header, run, until
from .test_live_policy import PROFILE

CONVERSATION = list(range(100, 180))
INDEX = PrefixIndexConfig(checkpoints="off", min_tokens=4)


class Fed:
    """A cluster whose prefill servers publish."""

    def __init__(self, it: Cluster, publishers: dict[str, KvPublisher]) -> None:
        self.cluster, self.publishers = it, publishers

    @property
    def index(self) -> PrefixIndex:
        index = self.cluster.router.prefixes
        assert isinstance(index, PrefixIndex)
        return index

    def blocks(self, site: str, server: str) -> int:
        held = self.index.index.held().get(Holder(site, server))
        return held.device if held is not None else 0

    async def ask(self, ids: list[int], fields: dict[str, Any] | None = None, **headers: str) -> FetchedResponse:
        return await self.cluster.request("/generate", {"input_ids": ids, **(fields or {})}, **headers)


@contextlib.asynccontextmanager
async def fed(
    *, local: tuple[str, ...] = ("l0", "l1"), index: PrefixIndexConfig = INDEX, **options: Any
) -> AsyncIterator[Fed]:
    """PrfaaS server p and local servers publish; t is 60 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        publishers = {name: KvPublisher(Path(folder), name) for name in ("p", *local)}
        events = {name: (one.endpoint, one.replay_endpoint) for name, one in publishers.items()}
        try:
            async with cluster(local=local, threshold_tokens=60, kv_events=events, prefix_index=index, **options) as it:
                yield Fed(it, publishers)
        finally:
            for publisher in publishers.values():
                publisher.close()


def test_a_request_goes_to_the_server_that_holds_its_prefix() -> None:
    async def main() -> None:
        async with fed() as it:
            it.publishers["l1"].stored(CONVERSATION[:40])
            await until(lambda: it.blocks("home", "l1") == 10, "the blocks of l1")
            for _ in range(3):
                answer = await it.ask(CONVERSATION[:58])
                assert header(answer, "x-prfaas-prefill") == "home/l1"
                assert header(answer, "x-prfaas-cached-tokens") == "40"
                assert header(answer, "x-prfaas-uncached-tokens") == "18"

    run(main)


def test_what_is_cached_at_home_counts_against_the_threshold() -> None:
    """80 tokens are above t = 60, but only 40 have to be computed at home."""

    async def main() -> None:
        async with fed() as it:
            assert header(await it.ask(CONVERSATION), "x-prfaas-route") == "prfaas"
            it.publishers["l0"].stored(CONVERSATION[:40])
            await until(lambda: it.blocks("home", "l0") == 10, "the blocks of l0")
            assert header(await it.ask(CONVERSATION), "x-prfaas-route") == "local"

    run(main)


def test_scarce_bandwidth_judges_caches_apart() -> None:
    """What only the PrfaaS site holds does not make a request short: nothing fetches it."""

    async def main() -> None:
        async with fed() as it:
            it.publishers["p"].stored(CONVERSATION[:76])
            await until(lambda: it.blocks("far", "p") == 19, "the blocks of p")
            answer = await it.ask(CONVERSATION)
            assert header(answer, "x-prfaas-prefill") == "far/p"
            assert header(answer, "x-prfaas-uncached-tokens") == "80"
            assert header(answer, "x-prfaas-cached-tokens") == "76"

    run(main)


def test_a_loaded_holder_gives_way_and_the_other_becomes_one() -> None:
    async def main() -> None:
        async with fed() as it:
            it.publishers["l0"].stored(CONVERSATION[:20])
            await until(lambda: it.blocks("home", "l0") == 5, "the blocks of l0")
            gate = it.cluster["l0"].gate = asyncio.Event()
            waiting = []
            for ends in range(6):
                waiting.append(asyncio.create_task(it.ask([*CONVERSATION[:40], ends])))
                await until(lambda: sum(len(it.cluster[n].bodies) for n in ("l0", "l1")) == len(waiting), "it is there")
            assert it.cluster["l0"].bodies
            assert it.cluster["l1"].bodies
            gate.set()
            await asyncio.gather(*waiting)
            it.publishers["l1"].stored(CONVERSATION[:40])
            await until(lambda: it.blocks("home", "l1") == 10, "the blocks of l1")
            assert header(await it.ask(CONVERSATION[:45]), "x-prfaas-prefill") == "home/l1"

    run(main)


def test_a_broken_promise_is_taken_out() -> None:
    async def told(request: Request, response: Response, it: Fed, cached: int) -> bool:
        for room in it.cluster["l0"].room_numbers(json.loads(request.body)):
            it.cluster["l0"].room(room).done.set()
        response.send(200, b'{"meta_info": {"cached_tokens": %d}}' % cached)
        return True

    async def main() -> None:
        async with fed() as it:
            it.publishers["l0"].stored(CONVERSATION[:40])
            await until(lambda: it.blocks("home", "l0") == 10, "the blocks of l0")
            it.cluster["l0"].behave = lambda request, response: told(request, response, it, 8)
            assert header(await it.ask(CONVERSATION[:50]), "x-prfaas-cached-tokens") == "40"
            await until(lambda: it.index.figures.broken_promises == 1, "the promise is known to be broken")
            assert it.blocks("home", "l0") == 2
            figures = json.loads((await it.cluster.request("/cache", method="GET")).body)["figures"]
            assert (figures["hit_tokens"], figures["told_prompt_tokens"]) == (8, 50)

    run(main)


def test_a_state_that_is_gone_leaves_the_checkpoint_before_it() -> None:
    async def main() -> None:
        async with fed(index=PrefixIndexConfig(checkpoints="on", min_tokens=4)) as it:
            it.publishers["l0"].stored(CONVERSATION[:20])
            it.publishers["l0"].stored(CONVERSATION[:40])
            await until(lambda: it.blocks("home", "l0") == 10, "the blocks of l0")
            answer = await it.ask(CONVERSATION[:38])
            assert header(answer, "x-prfaas-cached-tokens") == "20"  # 36 are there, without a state at their end
            body = parse_body("generate", json.dumps({"input_ids": CONVERSATION[:50]}).encode())
            body.token_ids = CONVERSATION[:50]
            assert it.index.match(body)["home"].servers == {"l0": 40}
            it.index.told(body, "home", "l0", 40, 20)
            assert it.index.match(body)["home"].servers == {"l0": 20}
            assert it.blocks("home", "l0") == 10

    run(main)


def test_salts_and_adapters_share_nothing() -> None:
    async def main() -> None:
        async with fed() as it:
            it.publishers["l0"].stored(CONVERSATION[:40], Namespace(cache_salt="blue"))
            it.publishers["l1"].stored(CONVERSATION[:40])
            await until(lambda: it.blocks("home", "l0") == it.blocks("home", "l1") == 10, "the blocks")
            for fields, cached in (
                ({"cache_salt": "blue"}, "40 l0"),
                ({"cache_salt": "red"}, "0"),
                ({}, "40 l1"),
                ({"lora_path": "adapter"}, ""),
                ({"extra_key": "k"}, ""),
            ):
                answer = await it.ask(CONVERSATION[:50], fields)
                assert header(answer, "x-prfaas-cached-tokens") == cached[:2].strip(), fields
                assert header(answer, "x-prfaas-prefill").endswith(cached[3:]), fields

    run(main)


TENANTS = [
    TenantConfig(name="open", api_keys=[hashlib.sha256(b"key-open").hexdigest()], cache_salt="open-salt"),
    TenantConfig(name="homely", sites=["home"]),
    TenantConfig(name="nowhere", sites=["far"]),
]


@pytest.mark.parametrize("required", [False, True])
def test_nothing_crosses_to_a_site_that_a_tenant_may_not_use(required: bool) -> None:
    async def main() -> None:
        tenancy = TenancyConfig(header="x-tenant", required=required)
        async with fed(tenancy=tenancy, tenants=TENANTS) as it:
            far, home = it.cluster["p"], ("l0", "l1")
            it.publishers["p"].stored(CONVERSATION[:76])
            await until(lambda: it.blocks("far", "p") == 19, "the blocks of p")
            answer = await it.ask(CONVERSATION, x_tenant="homely")
            assert header(answer, "x-prfaas-route") == "local"
            forced = await it.ask(CONVERSATION, x_tenant="homely", x_prfaas_route="prfaas")
            assert forced.status == 503
            assert b"Tenant homely may use home only" in forced.body
            for name in home:
                await it.cluster[name].stop()
            refused = await it.ask(CONVERSATION, x_tenant="homely")
            assert refused.status in (502, 503)
            assert not far.bodies
            assert (await it.ask(CONVERSATION, x_tenant="nowhere")).status == 503  # no decode there
            answer = await it.ask(CONVERSATION, authorization="Bearer key-open")
            assert answer.status == 200
            assert far.bodies[-1]["cache_salt"] == "open-salt"
            assert (await it.ask(CONVERSATION, x_tenant="other")).status == 403
            assert (await it.ask(CONVERSATION)).status == (403 if required else 200)

    run(main)


def test_a_tenants_salt_takes_the_place_of_the_clients() -> None:
    async def main() -> None:
        async with fed(tenancy=TenancyConfig(header="x-tenant"), tenants=TENANTS) as it:
            it.publishers["l0"].stored(CONVERSATION[:40], Namespace(cache_salt="open-salt"))
            await until(lambda: it.blocks("home", "l0") == 10, "the blocks of l0")
            own = {"cache_salt": "anothers"}
            answer = await it.ask(CONVERSATION[:50], own, authorization="Bearer key-open")
            assert header(answer, "x-prfaas-cached-tokens") == "40"
            assert it.cluster["l0"].bodies[-1]["cache_salt"] == "open-salt"

    run(main)


def test_a_live_policy_keeps_to_a_tenants_sites(tmp_path: Path) -> None:
    profile = tmp_path / "profile.json"
    save_profile(PROFILE, profile)

    async def main() -> None:
        async with fed(
            policy=PolicyConfig(profile=str(profile), threshold_tokens=10, correct_profile=False),
            hardware={"far": "quick", "home": "slow"},
            links={"far": [LinkConfig(to_site="home", capacity_gbps=1.0)]},
            tenancy=TenancyConfig(header="x-tenant"),
            tenants=TENANTS,
        ) as it:
            assert header(await it.ask(CONVERSATION), "x-prfaas-route") == "prfaas"
            sent = len(it.cluster["p"].bodies)
            for _ in range(5):
                answer = await it.ask(CONVERSATION, x_tenant="homely")
                assert header(answer, "x-prfaas-route") == "local"
            assert len(it.cluster["p"].bodies) == sent
            it.publishers["l1"].stored(CONVERSATION[:76])
            await until(lambda: it.blocks("home", "l1") == 19, "the blocks of l1")
            answer = await it.ask(CONVERSATION)
            assert header(answer, "x-prfaas-prefill") == "home/l1"

    run(main)
