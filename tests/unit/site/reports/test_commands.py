"""Commands of routers and operators to an agent over real sockets, in front of fake servers: drains, roles, limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from sglang_prfaas.monitor.reports import Answer, Command, Drain, SetLimits, SwitchRole, Undrain
from sglang_prfaas.site.reporter import Reporter
from tests.unit.site.conftest import PATIENCE_S
from tests.unit.site.reports.conftest import ChangingSite, ask, role, run, until


def test_drain_and_undrain(plan: ChangingSite) -> None:
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


def test_a_role_is_changed_under_a_request(plan: ChangingSite, events: Callable[[], list[str]]) -> None:
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
def test_a_failed_change_is_undone(plan: ChangingSite, words: str, message: str, restarts: int) -> None:
    async def main() -> None:
        async with plan.connected() as (site, links):
            plan.switch.write_text(words)
            answer = await links.command("pd", SwitchRole("prefill_0", "decode"), PATIENCE_S)
            assert (answer.done, answer.message) == (False, message)
            await until(lambda: role(links) == ("prefill", "ready"), "its return")
            assert site.servers["prefill_0"].restarts == restarts

    run(main())


def test_a_drain_that_takes_too_long_is_undone(plan: ChangingSite) -> None:
    async def main() -> None:
        async with plan.connected() as (_, links):
            plan.busy.write_text("2")
            answer = await links.command("pd", SwitchRole("prefill_0", "decode"), 0.3)
            assert (answer.done, answer.message) == (False, "not without requests after 0.3 s: 2 requests left")
            await until(lambda: role(links) == ("prefill", "ready"), "its return")

    run(main())


def test_a_server_that_dies_while_it_drains(plan: ChangingSite) -> None:
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


def test_limits_and_unknown_servers(plan: ChangingSite, events: Callable[[], list[str]]) -> None:
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


def test_operators_use_http_on_this_machine(plan: ChangingSite) -> None:
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
