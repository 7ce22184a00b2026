"""HTTP with the sites' certificates, over real sockets: who is served, whom a client takes, and exchanged files."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from sglang_prfaas.config.schema import AgentConfig, ReportsConfig, RouterSite, ServerConfig, SiteConfig, SiteSection
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.http import Client, HttpServer, Request, Response, UpstreamError
from sglang_prfaas.router.agent_tls import require_agents
from sglang_prfaas.site.agent import Agent
from sglang_prfaas.transport.security import PLAIN, SiteTls, load_security, make
from sglang_prfaas.transport.security.peers import fingerprint
from tests.transport.keyring import Keyring, now
from tests.transport.rig import DEADLINE_S


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(test(*args, **kwargs))

    return run


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys")


class Rig:
    """A server of site prfaas, and clients of other sites."""

    def __init__(self, keyring: Keyring, server: HttpServer, served: list[str]) -> None:
        self.keyring, self.server, self.served = keyring, server, served
        self.gate = asyncio.Event()
        """Answers wait for it."""
        self.gate.set()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.port}"

    async def ask(self, keys: Keyring | None, site: str = "pd", expected: str = "prfaas") -> bytes:
        client = Client()
        try:
            if keys is not None:
                security = load_security(keys.config(site))
                client.require(self.url, SiteTls(security, listens=False, site=expected))
            answer = await client.upstream(f"{self.url}/below").fetch("GET", "/x", timeout_s=DEADLINE_S)
            return answer.body
        finally:
            await client.close()


@contextlib.asynccontextmanager
async def serving(keyring: Keyring, site: str = "prfaas") -> AsyncIterator[Rig]:
    served: list[str] = []

    async def handle(request: Request, response: Response) -> None:
        served.append(request.path)
        await rig.gate.wait()
        response.send(200, b"yes")

    server = HttpServer(handle)
    await server.start("127.0.0.1", 0, peers=SiteTls(load_security(keyring.config(site)), listens=True))
    rig = Rig(keyring, server, served)
    try:
        yield rig
    finally:
        await server.close()


async def refused(asking: Callable[[], Awaitable[object]]) -> str:
    with pytest.raises(UpstreamError) as caught:
        await asking()
    return str(caught.value)


@in_loop
async def test_sites_of_the_allow_list_are_served(keyring: Keyring) -> None:
    async with serving(keyring) as rig:
        assert await rig.ask(keyring) == b"yes"
        assert await rig.ask(keyring, "third") == b"yes"
        assert rig.served == ["/below/x", "/below/x"]


@in_loop
async def test_a_client_may_compare_the_sites_name(keyring: Keyring) -> None:
    """As curl and Prometheus do: the certificate bears the name of its site."""
    async with serving(keyring) as rig:
        context = keyring.client_context("pd")
        context.check_hostname = True
        port = int(rig.url.rpartition(":")[2])

        async def shake_hands(name: str) -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
            writer.close()

        await shake_hands("prfaas")
        with pytest.raises(ssl.SSLCertVerificationError):
            await shake_hands("pd")


@in_loop
async def test_nobody_else_is(keyring: Keyring, tmp_path: Path) -> None:
    strangers = Keyring(tmp_path / "strangers")
    async with serving(keyring) as rig:
        await refused(lambda: rig.ask(strangers))
        await refused(lambda: rig.ask(None))
        plain = Client()
        await refused(lambda: plain.upstream(rig.url.replace("https", "http")).fetch("GET", "/", timeout_s=DEADLINE_S))
        await plain.close()
        assert rig.served == []
        assert await rig.ask(keyring) == b"yes"


@in_loop
async def test_a_client_sends_nothing_to_another_site(keyring: Keyring) -> None:
    async with serving(keyring, "third") as rig:
        why = await refused(lambda: rig.ask(keyring))
        assert why == f"what answers at {rig.url}/below is not who it should be: it is of site third, expected prfaas"
        assert rig.served == []


@in_loop
async def test_files_that_change(keyring: Keyring, caplog: pytest.LogCaptureFixture) -> None:
    """New certificates and a shorter allow-list hold for the next connection, without a restart."""
    async with serving(keyring) as rig:
        make.roll(keyring.directory, "prfaas", now=now())
        make.retire(keyring.directory, "prfaas")
        assert await rig.ask(keyring) == b"yes", "the client's list has the new certificate only"
        peers = keyring.directory / "prfaas" / "peers.toml"
        whole = peers.read_text()
        peers.write_text(whole.replace("[pd]", "[elsewhere]").replace(_own(keyring, "pd"), "sha256:" + "0" * 64))
        await refused(lambda: rig.ask(keyring))
        assert rig.served == ["/below/x"]
        assert f"refused: its certificate {_own(keyring, 'pd')} is not in peers.toml" in caplog.text
        peers.write_text(whole)
        assert await rig.ask(keyring) == b"yes"


def _own(keyring: Keyring, site: str) -> str:
    text = (keyring.directory / site / "site.crt").read_text()
    return fingerprint(ssl.PEM_cert_to_DER_cert(text))


@in_loop
async def test_a_site_that_is_taken_out_is_cut(keyring: Keyring) -> None:
    async with serving(keyring) as rig:
        rig.gate.clear()
        answer = asyncio.ensure_future(rig.ask(keyring))
        async with asyncio.timeout(DEADLINE_S):
            while not rig.served:
                await asyncio.sleep(0.01)
        peers = keyring.directory / "prfaas" / "peers.toml"
        peers.write_text(peers.read_text().replace(_own(keyring, "pd"), "sha256:" + "0" * 64))
        assert "closed" in await refused(lambda: answer)


@in_loop
async def test_an_agent_and_a_router(keyring: Keyring, tmp_path: Path) -> None:
    """By their configuration: the agent serves the router's site, and the router takes no other agent."""
    config = SiteConfig(
        site=SiteSection(name="prfaas", role="prfaas", model="m"),
        servers=[ServerConfig(name="p", role="prefill", port=1, bootstrap_port=2)],
        agent=AgentConfig(port=0, tls=True),
        transport=keyring.prfaas,
    )
    agent = Agent(config, {})
    url = f"https://127.0.0.1:{await agent.start()}"
    try:
        for site, works in (("prfaas", True), ("third", False)):
            client = Client()
            entry = RouterSite(name=site, role="prfaas", agent_url=url)
            require_agents(client, [entry], ReportsConfig(keys_dir=str(keyring.directory / "pd")))
            upstream = client.upstream(url)
            if works:
                assert (await upstream.fetch("GET", "/site", timeout_s=DEADLINE_S)).status == 200
            else:
                why = await refused(lambda upstream=upstream: upstream.fetch("GET", "/site", timeout_s=DEADLINE_S))
                assert why.endswith("it is of site prfaas, expected third")
            await client.close()
    finally:
        await agent.stop(0)


def test_keys_are_needed() -> None:
    with pytest.raises(ConfigError, match="needs keys"):
        SiteTls(PLAIN, listens=True)
