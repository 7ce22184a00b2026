"""LoRA adapters through the router: requests go to servers that have them, and nothing is taken for the base model."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.config.schema import LinkConfig, PolicyConfig
from sglang_prfaas.scheduler.profiles import save_profile
from tests.router.pd_fakes import MODEL, Cluster, cluster, header, run, until
from tests.router.test_live_policy import PROFILE


def error(body: bytes) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(body)["error"]
    return value


async def known(c: Cluster) -> None:
    """The router has every server's list."""
    await c.router.models.refresh()
    assert all(target.models is not None for target in c.router.registry.targets())


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/generate"])
@pytest.mark.parametrize("name", ["adapter", f"{MODEL}:adapter", "/models/tiny:adapter"])
def test_a_model_name_selects_an_adapter(path: str, name: str) -> None:
    """SGLang itself takes a listed adapter's own name for the base model, and at /generate does not read `model`."""

    async def main() -> None:
        async with cluster() as c:
            answer = await c.request(path, {"model": name, "prompt": "a", "text": "a", "messages": []})
            assert answer.status == 200, answer.body
            for sent in (c["l"].bodies[0], c["d"].bodies[0]):
                assert sent["lora_path"] == "adapter"
                assert sent["model"] == name

    run(main)


def test_a_lora_path_goes_on_as_it_is() -> None:
    async def main() -> None:
        async with cluster() as c:
            for given in ("adapter", ["adapter", None], None, ""):
                body = {"model": MODEL, "prompt": ["a", "b"], "lora_path": given}
                assert (await c.request(body=body)).status == 200
                assert c["d"].bodies[-1]["lora_path"] == given
            for empty in (None, "", []):
                assert (await c.request(body={"model": "adapter", "prompt": "a", "lora_path": empty})).status == 200
                assert c["d"].bodies[-1]["lora_path"] == "adapter"
                assert c["d"].requests[-1].body.count(b"lora_path") == 1
            both = await c.request(body={"model": "adapter", "prompt": "a", "lora_path": "adapter"})
            assert both.status == 200
            assert c["d"].requests[-1].body.count(b"lora_path") == 1

    run(main)


def test_an_adapter_that_is_not_there() -> None:
    async def main() -> None:
        async with cluster() as c:
            for body in ({"model": MODEL, "lora_path": "gone"}, {"model": f"{MODEL}:gone"}, {"lora_path": ["gone"]}):
                answer = await c.request(body={"prompt": "a", **body})
                assert answer.status == 404
                assert error(answer.body)["code"] == "model_not_found"
                assert "The LoRA adapter 'gone' is not loaded; loaded: adapter." in error(answer.body)["message"]
            two = await c.request(body={"model": f"{MODEL}:adapter", "prompt": "a", "lora_path": "other"})
            assert two.status == 400
            assert error(two.body)["code"] == "two_adapters"
            assert not c["d"].bodies

    run(main)


def test_an_adapter_that_was_loaded_since() -> None:
    async def main() -> None:
        async with cluster() as c:
            await known(c)
            for server in c.servers.values():
                server.adapters.append("new")

            async def served() -> bool:
                return (await c.request(body={"model": "new", "prompt": "a"})).status == 200

            while not await served():  # lists are asked for once a second at most
                await asyncio.sleep(0.05)
            assert c["d"].bodies[-1]["lora_path"] == "new"

    run(main)


@pytest.mark.parametrize("mode", ["fixed", "live"])
def test_requests_go_to_servers_that_have_the_adapter(mode: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {}
    if mode == "live":
        save_profile(PROFILE, tmp_path / "profile.json")
        options = {
            "policy": PolicyConfig(profile=str(tmp_path / "profile.json"), threshold_tokens=10),
            "hardware": {"far": "quick", "home": "slow"},
            "links": {"far": [LinkConfig(to_site="home", capacity_gbps=1.0)]},
        }

    async def main() -> None:
        async with cluster(("p", "p2"), ("l", "l2"), ("d", "d2"), **options) as c:
            for name in ("p", "l2", "d2"):
                c[name].adapters = []
            await known(c)
            for prompt in ("a", "a " * 50) * 4:
                answer = await c.request(body={"model": "adapter", "prompt": prompt})
                assert answer.status == 200
                assert header(answer, "x-prfaas-prefill") in ("home/l", "far/p2")
                assert header(answer, "x-prfaas-decode") == "home/d"
            assert {len(c[name].bodies) for name in ("p", "l2", "d2")} == {0}
            for _ in range(4):
                assert (await c.short()).status == 200
            assert c["l2"].bodies
            assert c["d2"].bodies

    run(main)


def test_a_long_prompt_stays_at_home_where_the_other_site_lacks_the_adapter() -> None:
    async def main() -> None:
        async with cluster() as c:
            c["p"].adapters = []
            await known(c)
            answer = await c.request(body={"model": "adapter", "prompt": "a " * 50})
            assert header(answer, "x-prfaas-route") == "local"
            assert header(await c.long(), "x-prfaas-route") == "prfaas"
            for target in c.router.registry.targets():
                if target.name == "l":
                    target.adapters = frozenset()
            refused = await c.request(body={"model": "adapter", "prompt": "a"})
            assert refused.status == 503
            assert "Only servers that have the LoRA adapter adapter may serve it" in error(refused.body)["message"]

    run(main)


def test_a_server_that_comes_back_is_asked_again() -> None:
    async def main() -> None:
        async with cluster() as c:
            port = c["d"].port
            watching = asyncio.create_task(c.router.models.watch(0.05))
            target = next(t for t in c.router.registry.targets() if t.name == "d")
            await until(lambda: target.adapters == {"adapter"}, "the list of d")
            await c["d"].stop()
            await until(lambda: c.down("d"), "d is down")
            assert target.models is None
            c["d"].adapters = []
            await c["d"].listen(port)
            await until(lambda: target.models == {MODEL} and not target.adapters, "the list of d as it is now")
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching

    run(main)
