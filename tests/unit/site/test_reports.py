"""Agents and routers over real sockets, in front of fake servers: reports up, commands down, roles changed."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import http.client
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import zmq

from sglang_prfaas.config.schema import ReportsConfig, RouterSite, SiteConfig, TransportConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.monitor.reports import Answer, Command, Drain, ServerState, SetLimits, SiteState, SwitchRole, Undrain
from sglang_prfaas.router.agent_links import AgentLinks
from sglang_prfaas.site import Site
from sglang_prfaas.site.free_ports import free_ports
from sglang_prfaas.site.progress import Progress, silent
from sglang_prfaas.site.reporter import Reporter
from sglang_prfaas.transport.security import make
from sglang_prfaas.transport.security.key_files import read_curve_key
from tests.unit.site.conftest import LIMITS, PATIENCE_S, MakeSite, changed

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


class Plan:
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
def plan(make_site: MakeSite, fake_python: str, tmp_path: Path) -> Plan:
    return Plan(make_site, fake_python, tmp_path)


def server(links: AgentLinks, name: str) -> ServerState | None:
    state: SiteState | None = links.reports.state("pd")
    return next((one for one in state.servers if one.name == name), None) if state is not None else None


def role(links: AgentLinks, name: str = "prefill_0") -> tuple[str, str]:
    found = server(links, name)
    assert found is not None
    return found.role, found.state


def ask(plan: Plan, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    parts = urlsplit(f"http://127.0.0.1:{plan.config.agent.port}")
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_loads_and_states_reach_every_router(plan: Plan) -> None:
    async def main() -> None:
        heard: list[tuple[int, str]] = []
        async with plan.site() as site:
            routers = [plan.links(on_state=partial(note, heard, index)) for index in range(2)]
            for links in routers:
                links.start()
            plan.busy.write_text("4")
            for links in routers:
                await until(partial(runs, links, 4), "4 running requests")
                load = links.reports.server("pd", "prefill_0")
                assert load is not None
                assert (load.role, load.kv_tokens_total) == ("prefill", 1000)
                assert load.age_s < PATIENCE_S
            heard.clear()
            await site.servers["decode_2"].kill()
            for index in range(2):
                await until(partial(heard.count, (index, "restarting")), "the death")
                await until(lambda: heard[-1][1] == "ready", "the restart")
            assert routers[0].reports.counters()["pd"][0] == 0, "no report was lost"
            text = (await asyncio.to_thread(ask, plan, "GET", "/metrics"))[1].decode()
            assert 'prfaas_server_requests{site="pd",server="prefill_0",queue="running"} 4' in text
            assert 'prfaas_agent_routers{site="pd"} 2' in text
            for links in routers:
                await links.stop()

    run(main())


def note(heard: list[tuple[int, str]], index: int, state: SiteState) -> None:
    heard += [(index, server.state) for server in state.servers if server.name == "decode_2"]


def runs(links: AgentLinks, requests: int) -> bool:
    load = links.reports.server("pd", "prefill_0")
    return load is not None and load.running == requests


def test_routers_and_agents_come_and_go(plan: Plan) -> None:
    async def main() -> None:
        links = plan.links()
        links.start()
        async with plan.site():
            await until(lambda: links.reports.state("pd"), "a router that was there first hears of the agent")
            await links.stop()
            links = plan.links()
            links.start()
            await until(lambda: links.reports.state("pd"), "a router that was started anew hears of it")
        async with plan.site():
            await until(lambda: links.reports.counters()["pd"][1] == 1, "the new agent's reports")
            await until(lambda: role(links)[1] == "ready", "its servers")
        await links.stop()

    run(main())


def test_drain_and_undrain(plan: Plan) -> None:
    async def main() -> None:
        async with plan.connected() as (site, links):
            plan.busy.write_text("1")
            drained = asyncio.create_task(links.command("pd", Drain("prefill_0"), PATIENCE_S))
            await until(lambda: role(links) == ("prefill", "draining"), "the drain")
            assert not drained.done()
            refused = await links.command("pd", SwitchRole("prefill_1", "decode"), PATIENCE_S)
            assert refused.message == "server prefill_0 is being drained or changed; one at a time"
            plan.busy.write_text("0")
            assert (await drained).done
            status, body = await asyncio.to_thread(ask, plan, "POST", "/servers/prefill_0/generate", b"{}")
            assert (status, json.loads(body)["error"]["code"]) == (503, "draining")
            assert (await asyncio.to_thread(ask, plan, "GET", "/servers/prefill_0/health"))[0] == 200
            refused = await links.command("pd", Drain("prefill_1"), PATIENCE_S)
            assert "min_prefill_servers is 1" in refused.message
            assert (await links.command("pd", Undrain("prefill_0"), PATIENCE_S)).done
            await until(lambda: role(links) == ("prefill", "ready"), "its return")
            assert (await asyncio.to_thread(ask, plan, "POST", "/servers/prefill_0/generate", b"{}"))[0] == 200
            assert site.servers["prefill_0"].restarts == 0

    run(main())


def test_a_role_is_changed_under_a_request(plan: Plan, events: Callable[[], list[str]]) -> None:
    async def main() -> None:
        async with plan.connected() as (_, links):
            plan.hold.unlink()
            plan.switch.write_text("busy busy")
            request = asyncio.create_task(asyncio.to_thread(ask, plan, "POST", "/servers/prefill_0/generate", b"x"))
            await until(lambda: "prefill_0 held" in events(), "the request to arrive")
            switched = asyncio.create_task(links.command("pd", SwitchRole("prefill_0", "decode"), PATIENCE_S))
            await until(lambda: role(links)[1] == "draining", "the drain")
            assert not any("asked to decode" in line for line in events())
            plan.hold.touch()
            assert await request == (200, b"x")
            answer = await switched
            assert (answer.done, answer.message) == (True, "it is decode now")
            await until(lambda: role(links) == ("decode", "ready"), "the new role")
            asked = [line for line in events() if "asked to decode" in line]
            assert asked == [*["prefill_0 asked to decode but busy"] * 2, "prefill_0 asked to decode"]
            text = await asyncio.to_thread(ask, plan, "GET", "/metrics")
            assert b'prfaas_role_changes_total{site="pd",server="prefill_0",result="done"} 1' in text[1]
            again = await links.command("pd", SwitchRole("prefill_0", "decode"), PATIENCE_S)
            assert (again.done, again.message) == (True, "it is decode already")

    run(main())


@pytest.mark.parametrize(
    ("words", "message", "restarts"),
    [
        ("refuse", "no headroom", 0),
        ("sick", "not healthy as decode within 2 s; it was made prefill again", 0),
        ("break", "restart required; it was restarted as prefill", 1),
        ("sick break", "not healthy as decode within 2 s; restart required; it was restarted as prefill", 1),
    ],
)
def test_a_failed_change_is_undone(plan: Plan, words: str, message: str, restarts: int) -> None:
    async def main() -> None:
        async with plan.connected() as (site, links):
            plan.switch.write_text(words)
            answer = await links.command("pd", SwitchRole("prefill_0", "decode"), PATIENCE_S)
            assert (answer.done, answer.message) == (False, message)
            await until(lambda: role(links) == ("prefill", "ready"), "its return")
            assert site.servers["prefill_0"].restarts == restarts

    run(main())


def test_a_drain_that_takes_too_long_is_undone(plan: Plan) -> None:
    async def main() -> None:
        async with plan.connected() as (_, links):
            plan.busy.write_text("2")
            answer = await links.command("pd", SwitchRole("prefill_0", "decode"), 0.3)
            assert (answer.done, answer.message) == (False, "not without requests after 0.3 s: 2 requests left")
            await until(lambda: role(links) == ("prefill", "ready"), "its return")

    run(main())


def test_a_server_that_dies_while_it_drains(plan: Plan) -> None:
    async def main() -> None:
        async with plan.connected() as (site, links):
            plan.busy.write_text("2")
            switched = asyncio.create_task(links.command("pd", SwitchRole("prefill_0", "decode"), PATIENCE_S))
            await until(lambda: role(links)[1] == "draining", "the drain")
            await site.servers["prefill_0"].kill()
            answer = await switched
            assert not answer.done
            assert answer.message.startswith("its process ended")
            await until(lambda: role(links) == ("prefill", "ready"), "its return")

    run(main())


def test_limits_and_unknown_servers(plan: Plan, events: Callable[[], list[str]]) -> None:
    async def main() -> None:
        async with plan.connected() as (_, links):
            plan.hold.unlink()
            answer = await links.command("pd", SetLimits("prefill_0", 1), PATIENCE_S)
            assert (answer.done, answer.message) == (True, "at most 1 requests at once")
            first = asyncio.create_task(asyncio.to_thread(ask, plan, "POST", "/servers/prefill_0/generate", b"1"))
            await until(lambda: "prefill_0 held" in events(), "the request to arrive")
            status, body = await asyncio.to_thread(ask, plan, "POST", "/servers/prefill_0/generate", b"2")
            assert (status, json.loads(body)["error"]["message"]) == (
                503,
                "Server prefill_0 has 1 requests in work, its limit.",
            )
            plan.hold.touch()
            assert await first == (200, b"1")
            answer = await links.command("pd", Drain("nobody"), PATIENCE_S)
            assert answer.message == "no such server: nobody; the site has prefill_0, prefill_1, decode_2"

    run(main())


def test_operators_use_http_on_this_machine(plan: Plan) -> None:
    async def main() -> None:
        async with plan.connected() as (_, links):

            async def post(path: str, body: object = None) -> tuple[int, Any]:
                data = json.dumps(body).encode() if body is not None else b""
                status, answer = await asyncio.to_thread(ask, plan, "POST", f"/control/{path}", data)
                return status, json.loads(answer)

            assert await post("prefill_0/role", {"role": "decode"}) == (
                200,
                {"done": True, "message": "it is decode now"},
            )
            await until(lambda: role(links) == ("decode", "ready"), "the new role")
            assert (await post("prefill_1/drain"))[0] == 409
            assert (await post("prefill_0/role", {"role": "cook"}))[0] == 400
            assert (await post("prefill_0/role"))[0] == 400
            assert (await post("prefill_0/dance"))[0] == 404
            assert (await asyncio.to_thread(ask, plan, "GET", "/control/prefill_0/drain"))[0] == 405

    run(main())


def test_one_id_is_one_command() -> None:
    """A router that sends a command again, as it does until it is answered, has it done once, and is answered."""

    async def main() -> None:
        started: list[Command] = []
        end = asyncio.Event()

        async def work() -> tuple[bool, str]:
            await end.wait()
            return True, "done"

        def execute(command: Command) -> asyncio.Task[tuple[bool, str]]:
            started.append(command)
            return asyncio.create_task(work())

        reporter = Reporter("pd", lambda report: None, execute)
        answers: list[tuple[str, Answer]] = []
        command = Command(id="one", deadline_s=1.0, action=Drain("s"))
        reporter.command(command, lambda answer: answers.append(("first", answer)))
        reporter.command(command, lambda answer: answers.append(("again", answer)))
        end.set()
        await until(lambda: answers, "the answer")
        reporter.command(command, lambda answer: answers.append(("late", answer)))
        assert [who for who, _ in answers] == ["again", "late"], "whoever asked last is there to hear it"
        assert {answer for _, answer in answers} == {Answer(id="one", done=True, message="done")}
        assert started == [command]

    run(main())


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def keyed(plan: Plan, tmp_path: Path) -> Plan:
    """The site with keys, beside those of an east site, and a stranger's that bear the same names."""
    now = datetime.datetime.now(datetime.UTC)
    make.make_keys(tmp_path / "keys", {"pd": (), "east": ()}, now=now)
    make.make_keys(tmp_path / "strange", {"pd": (), "east": ()}, now=now)
    transport = TransportConfig(keys_dir=str(tmp_path / "keys" / "pd"))
    plan.config = msgspec.structs.replace(plan.config, transport=transport)
    return plan


def with_keys(path: Path) -> ReportsConfig:
    return msgspec.structs.replace(REPORTS, keys_dir=str(path))


def test_keys_decide_who_is_told_and_who_commands(keyed: Plan, tmp_path: Path) -> None:
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
    keyed: Plan, tmp_path: Path, caplog: pytest.LogCaptureFixture
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


def test_a_router_finds_the_key_in_use_while_keys_are_exchanged(keyed: Plan, tmp_path: Path) -> None:
    async def main() -> None:
        async with keyed.site():
            make.roll(tmp_path / "keys", "pd", now=datetime.datetime.now(datetime.UTC))
            links = keyed.links(with_keys(tmp_path / "keys" / "east"))
            links.start()
            await until(lambda: links.reports.state("pd"), "the old key, which the agent still has, to be found")
            await links.stop()

    run(main())


def test_without_keys_on_this_machine_only(plan: Plan) -> None:
    async def main() -> None:
        entry = RouterSite(name="pd", role="pd", agent_url="http://192.0.2.1:9000", reports_port=9001)
        with pytest.raises(ConfigError, match=r"agent of pd at 192\.0\.2\.1 is beyond this machine"):
            AgentLinks([entry], REPORTS).start()
        agent = msgspec.structs.replace(plan.config.agent, host="0.0.0.0")
        plan.config = msgspec.structs.replace(plan.config, agent=agent)
        with pytest.raises(ConfigError, match="the agent's report port would listen on"):
            await plan.site().start()

    run(main())


def test_bytes_that_are_no_message_change_nothing(plan: Plan) -> None:
    async def main() -> None:
        async with plan.connected() as (_, links):
            context = zmq.Context()
            sock = context.socket(zmq.DEALER)
            sock.connect(f"tcp://127.0.0.1:{plan.config.agent.reports_port}")
            for frames in ([b""], [b"\xff" * 100], [b"a", b"b", b"c"], [b"\x81\xa4type\xa7command"]):
                sock.send_multipart(frames)
            assert (await links.command("pd", Undrain("prefill_0"), PATIENCE_S)).done
            sock.close(linger=0)
            context.term()

    run(main())
