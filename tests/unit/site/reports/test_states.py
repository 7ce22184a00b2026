"""Agents and routers over real sockets, in front of fake servers: reports up."""

from __future__ import annotations

import asyncio
from functools import partial

import msgspec
import pytest
import zmq

from sglang_prfaas.monitor.reports import LinkLoad, SiteState, Undrain
from sglang_prfaas.router.agent_links import AgentLinks
from tests.unit.site.conftest import PATIENCE_S
from tests.unit.site.reports.conftest import ChangingSite, ask, role, run, until


def test_loads_and_states_reach_every_router(plan: ChangingSite) -> None:
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


def test_a_link_that_gets_congested_is_told_of_at_once_and_its_end_too(
    plan: ChangingSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = msgspec.structs.replace(plan.config.agent, report_interval_s=3600.0)
    plan.config = msgspec.structs.replace(plan.config, agent=agent)

    async def main() -> None:
        async with plan.connected() as (site, links):
            for congested in (True, False, True):
                seen = LinkLoad(from_site="pd", to_site="far", congested=congested)
                monkeypatch.setattr(site.agent._links, "links", lambda seen=seen: [seen])

                def told(congested: bool = congested) -> bool:
                    link = links.reports.link("pd", "far")
                    return link is not None and link.congested is congested

                await until(told, f"the router hears: congested is {congested}")

    run(main())


def test_routers_and_agents_come_and_go(plan: ChangingSite) -> None:
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


def test_bytes_that_are_no_message_change_nothing(plan: ChangingSite) -> None:
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
