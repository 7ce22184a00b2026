"""A site whose servers may change roles, an agent in front of it, and routers that listen."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_prfaas.config.schema import ReportsConfig, RouterSite, SiteConfig
from sglang_prfaas.monitor.reports import ServerState, SiteState
from sglang_prfaas.router.agent_links import AgentLinks
from sglang_prfaas.site import Site
from sglang_prfaas.site.free_ports import free_ports
from sglang_prfaas.site.progress import Progress, silent
from tests.unit.site.conftest import LIMITS, PATIENCE_S, MakeSite, ask_agent, changed

ROLES = ("prefill", "prefill", "decode")
REPORTS = ReportsConfig(heartbeat_interval_s=0.1, stale_after_s=PATIENCE_S)


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 3 * PATIENCE_S))


async def until(condition: Callable[[], object], what: str) -> None:
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"never came true: {what}") from None


class ChangingSite:
    """A pd site of two prefill servers and a decode server, all of which may change roles."""

    def __init__(self, make_site: MakeSite, python: str, tmp_path: Path) -> None:
        self.python = python
        self.busy, self.switch, self.hold = tmp_path / "busy", tmp_path / "switch", tmp_path / "hold"
        env = {"FAKE_BUSY": str(self.busy), "FAKE_SWITCH": str(self.switch), "FAKE_HOLD": str(self.hold)}
        self.hold.touch()
        config = make_site(roles=ROLES, agent=True, prefill_0=env)
        agent = msgspec.structs.replace(config.agent, reports_port=free_ports(1)[0], report_interval_s=0.05)
        site = msgspec.structs.replace(config.site, args=["--enable-pd-role-switch"], transfer_backend="mooncake")
        limits = changed(LIMITS, role_switch_timeout_s=2.0)
        self.config: SiteConfig = msgspec.structs.replace(config, agent=agent, site=site, limits=limits)

    def site(self) -> Site:
        return Site(self.config, python=self.python, progress=Progress(write=silent))

    def links(self, reports: ReportsConfig = REPORTS, **callbacks: Any) -> AgentLinks:
        agent = self.config.agent
        url = f"http://127.0.0.1:{agent.port}"
        entry = RouterSite(name="pd", role="pd", agent_url=url, reports_port=agent.reports_port)
        return AgentLinks([entry], reports, **callbacks)

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[Site, AgentLinks]]:
        """The site, and a router that has its first reports."""
        async with self.site() as site:
            links = self.links()
            links.start()
            try:
                await until(lambda: server(links, "prefill_0") is not None, "the first reports")
                yield site, links
            finally:
                await links.stop()


@pytest.fixture
def plan(make_site: MakeSite, fake_python: str, tmp_path: Path) -> ChangingSite:
    return ChangingSite(make_site, fake_python, tmp_path)


def server(links: AgentLinks, name: str) -> ServerState | None:
    state: SiteState | None = links.reports.state("pd")
    return next((one for one in state.servers if one.name == name), None) if state is not None else None


def role(links: AgentLinks, name: str = "prefill_0") -> tuple[str, str]:
    found = server(links, name)
    assert found is not None
    return found.role, found.state


def ask(plan: ChangingSite, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    return ask_agent(f"http://127.0.0.1:{plan.config.agent.port}", method, path, body)
