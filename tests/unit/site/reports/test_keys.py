"""Keys of reports and commands: who is told, who commands, and what is refused without any."""

from __future__ import annotations

import datetime
from functools import partial
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.config.schema import ReportsConfig, RouterSite, TransportConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.monitor.reports import Drain
from sglang_prfaas.router.agent_links import AgentLinks
from sglang_prfaas.transport.security import make
from sglang_prfaas.transport.security.key_files import read_curve_key
from tests.unit.site.conftest import PATIENCE_S
from tests.unit.site.reports.conftest import REPORTS, ChangingSite, run, until


@pytest.fixture
def keyed(plan: ChangingSite, tmp_path: Path) -> ChangingSite:
    """The site with keys, beside those of an east site, and a stranger's that bear the same names."""
    now = datetime.datetime.now(datetime.UTC)
    make.make_keys(tmp_path / "keys", {"pd": (), "east": ()}, now=now)
    make.make_keys(tmp_path / "strange", {"pd": (), "east": ()}, now=now)
    transport = TransportConfig(keys_dir=str(tmp_path / "keys" / "pd"))
    plan.config = msgspec.structs.replace(plan.config, transport=transport)
    return plan


def with_keys(path: Path) -> ReportsConfig:
    return msgspec.structs.replace(REPORTS, keys_dir=str(path))


def test_keys_decide_who_is_told_and_who_commands(keyed: ChangingSite, tmp_path: Path) -> None:
    async def main() -> None:
        async with keyed.site():
            own = keyed.links(with_keys(tmp_path / "keys" / "pd"))
            east = keyed.links(with_keys(tmp_path / "keys" / "east"))
            stranger = keyed.links(with_keys(tmp_path / "strange" / "pd"))
            nobody = keyed.links()
            for one in (own, east, stranger, nobody):
                one.start()
            for one in (own, east):
                await until(partial(one.reports.state, "pd"), "reports with keys of the deployment")
            await until(lambda: stranger.problem("pd"), "the stranger to be refused")
            await until(lambda: nobody.problem("pd"), "a router without keys to be refused")
            assert stranger.reports.state("pd") is None
            assert nobody.reports.state("pd") is None
            refused = await east.command("pd", Drain("prefill_0"), PATIENCE_S)
            assert refused.message == "routers of site east may not command site pd; see agent.commands_from"
            assert (await own.command("pd", Drain("prefill_0"), PATIENCE_S)).done
            for one in (own, east, stranger, nobody):
                await one.stop()

    run(main())


def test_a_router_whose_site_is_taken_off_the_list_is_told_nothing_more(
    keyed: ChangingSite, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with keyed.site():
            own = keyed.links(with_keys(tmp_path / "keys" / "pd"))
            east = keyed.links(with_keys(tmp_path / "keys" / "east"))
            for one in (own, east):
                one.start()
                await until(partial(one.reports.state, "pd"), "reports")
            path = tmp_path / "keys" / "pd" / "peers.toml"
            key = read_curve_key(tmp_path / "keys" / "east" / "curve.key")[0].decode()
            path.write_text(path.read_text().replace(f'"{key}"', ""))
            await until(lambda: east.problem("pd"), "the end of its connection")
            assert (await own.command("pd", Drain("prefill_0"), PATIENCE_S)).done
            assert [text for text in caplog.messages if "reports: router" in text and "is cut off: its key" in text]
            for one in (own, east):
                await one.stop()

    run(main())


def test_a_router_finds_the_key_in_use_while_keys_are_exchanged(keyed: ChangingSite, tmp_path: Path) -> None:
    async def main() -> None:
        async with keyed.site():
            make.roll(tmp_path / "keys", "pd", now=datetime.datetime.now(datetime.UTC))
            links = keyed.links(with_keys(tmp_path / "keys" / "east"))
            links.start()
            await until(lambda: links.reports.state("pd"), "the old key, which the agent still has, to be found")
            await links.stop()

    run(main())


def test_without_keys_on_this_machine_only(plan: ChangingSite) -> None:
    async def main() -> None:
        entry = RouterSite(name="pd", role="pd", agent_url="http://192.0.2.1:9000", reports_port=9001)
        with pytest.raises(ConfigError, match=r"agent of pd at 192\.0\.2\.1 is beyond this machine"):
            AgentLinks([entry], REPORTS).start()
        agent = msgspec.structs.replace(plan.config.agent, host="0.0.0.0")
        plan.config = msgspec.structs.replace(plan.config, agent=agent)
        with pytest.raises(ConfigError, match="the agent's report port would listen on"):
            await plan.site().start()

    run(main())
