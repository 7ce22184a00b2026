"""Every change of a server is to be seen by decisions between two looks: the site's version grows with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from sglang_prfaas.config.schema import LinkConfig, RouterConfig, RouterSection, RouterSite, TargetConfig
from sglang_prfaas.http import Client
from sglang_prfaas.router.registry import Registry, Target

AGENT = "http://127.0.0.1:1"


def registry() -> tuple[Registry, Target]:
    servers = [
        TargetConfig(name="p", role="prefill", url="http://127.0.0.1:2", bootstrap_port=3),
        TargetConfig(name="d", role="decode", url="http://127.0.0.1:4"),
    ]
    sites = [RouterSite(name="home", role="pd", servers=servers)]
    config = RouterConfig(router=RouterSection(model="m", port=1), sites=sites)

    async def make() -> Registry:
        return Registry(config, Client())

    made = asyncio.run(make())
    return made, next(made.targets())


CHANGES: dict[str, Callable[[Target], None]] = {
    "a request": lambda target: target.add_load(1, 500),
    "its end": lambda target: target.add_load(-1, -500),
    "a queue": lambda target: target.set_wait(1.5),
    "another role": lambda target: target.set_role("decode"),
    "a good check": lambda target: target.mark_healthy(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_server_is_counted(change: str) -> None:
    _, target = registry()
    before = target.within.version
    CHANGES[change](target)
    assert target.within.version > before


def test_a_server_that_fails_is_counted() -> None:
    _, target = registry()
    target.mark_healthy()
    before = target.within.version
    target.suspect("refused")
    assert not target.alive
    assert target.within.version > before


def test_what_an_agent_lists_is_counted() -> None:
    made, target = registry()
    site = RouterSite(name="home", role="pd", agent_url=AGENT)
    versions = [target.within.version]
    for names in (["p", "new"], ["new"]):
        listed = [{"name": name, "role": "prefill", "path": f"/servers/{name}"} for name in names]
        made.apply_agent(site, msgspec.json.encode({"name": "home", "servers": listed}))
        versions.append(target.within.version)
    assert versions == sorted(set(versions))
    assert [server.name for server in made.targets()] == ["new"]


def test_a_link_that_an_agent_has_otherwise_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made, _ = registry()
    links = [LinkConfig(to_site="elsewhere", capacity_gbps=100)]
    site = RouterSite(name="home", role="prfaas", agent_url=AGENT, links=links)
    answer = {"name": "home", "servers": [], "configured_links": [{"to_site": "elsewhere", "capacity_gbps": 10}]}
    for _ in range(2):
        made.apply_agent(site, msgspec.json.encode(answer))
    (said,) = [text for text in caplog.messages if "capacity_gbps" in text]
    assert "100 in the router's file, 10 in the site's" in said
