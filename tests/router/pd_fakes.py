"""Servers that speak SGLang's PD protocol in a few lines, and a router in front of them, all in one event loop.

Prefill and decode meet by bootstrap room: decode answers only once prefill has done the room, as with a real transfer.
Every wait has an event behind it and a generous deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from sglang_prfaas.config.schema import (
    LinkConfig,
    PolicyConfig,
    PrefixIndexConfig,
    RouterConfig,
    RouterLimits,
    RouterSection,
    RouterSite,
    ServerRole,
    SiteRole,
    TargetConfig,
    TenancyConfig,
    TenantConfig,
)
from sglang_prfaas.http import Client, ClientLimits, FetchedResponse, Framing, HttpServer, Request, Response
from sglang_prfaas.monitor.load_source import LoadSource
from sglang_prfaas.router.access_log import AccessLog
from sglang_prfaas.router.app import Router
from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.prefixes import PrefixLookup
from sglang_prfaas.router.tokens import TokenCount, TokenCounter

DEADLINE_S = 30.0
MODEL = "tiny"


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test's coroutine; a hang fails the test."""
    asyncio.run(asyncio.wait_for(main(), 3 * DEADLINE_S))


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait until a condition holds."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"never came true: {what}") from None


class WordCounter(TokenCounter):
    """One token per word of the prompt's text: no tokenizer, no thread."""

    def __init__(self) -> None:
        super().__init__(MODEL)

    async def count(self, body: ParsedBody, low_tokens: float, high_tokens: float) -> TokenCount:
        words = len(bytes(body.prompt).split()) if body.prompt is not None else 0
        return TokenCount(words, words, True)


class Room:
    """Where the two legs of a request meet."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.failed = ""


class FakeServer:
    """One SGLang server: `behave` may answer a generation request itself and return True."""

    def __init__(self, name: str, role: str, rooms: dict[int, Room]) -> None:
        self.name = name
        self.role = role
        self.rooms = rooms
        self.requests: list[Request] = []
        self.bodies: list[dict[str, Any]] = []
        self.adapters = ["adapter"]
        self.aborted = 0
        self.health = 200
        self.chunks = [b'data: {"i":%d,"text":"\xc3\xa9"}\n\n' % i for i in range(5)] + [b"data: [DONE]\n\n"]
        self.answer = b'{"choices": [{"text": "\xc3\xa9 1.0e5"}],   "x":1}'
        self.behave: Callable[[Request, Response], Coroutine[Any, Any, bool]] | None = None
        self.started = asyncio.Event()  # a generation request arrived
        self.gate: asyncio.Event | None = None  # generation waits for it
        self.server: HttpServer | None = None
        self.port = 0

    async def listen(self, port: int = 0) -> None:
        self.server = HttpServer(self.handle)
        self.port = await self.server.start("127.0.0.1", port)

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.close()
            self.server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def room(self, number: int) -> Room:
        return self.rooms.setdefault(number, Room())

    async def handle(self, request: Request, response: Response) -> None:
        if request.path in ("/health", "/ready"):
            response.send(self.health, b"")
            return
        if request.path == "/v1/models":
            adapters = [{"id": name, "parent": MODEL} for name in self.adapters]
            response.send(200, json.dumps({"data": [{"id": MODEL}, *adapters]}).encode())
            return
        self.requests.append(request)
        if request.path not in ("/v1/chat/completions", "/v1/completions", "/generate"):
            response.send(200, b"passed " + request.target, ((b"content-type", b"text/plain"),))
            return
        body = json.loads(request.body)
        self.bodies.append(body)
        self.started.set()
        try:
            if self.behave is not None and await self.behave(request, response):
                return
            if self.gate is not None:
                await self.gate.wait()
            await (self.prefill if self.role == "prefill" else self.decode)(body, response)
        except asyncio.CancelledError:
            self.aborted += 1
            raise

    def room_numbers(self, body: dict[str, Any]) -> list[int]:
        value = body["bootstrap_room"]
        return value if isinstance(value, list) else [value]

    async def prefill(self, body: dict[str, Any], response: Response) -> None:
        for number in self.room_numbers(body):
            self.room(number).done.set()
        if body.get("stream"):
            response.start(200, [(b"content-type", b"text/event-stream")], Framing.CHUNKED)
            response.write(b'data: {"meta_info": {}}\n\n')
            response.end()
        else:
            response.send(200, b'{"meta_info": {}}')

    async def decode(self, body: dict[str, Any], response: Response) -> None:
        for number in self.room_numbers(body):
            await self.room(number).done.wait()
        if not body.get("stream"):
            response.send(200, self.answer, ((b"content-type", b"application/json"), (b"x-upstream", b"yes")))
            return
        response.start(200, [(b"content-type", b"text/event-stream; charset=utf-8")], Framing.CHUNKED)
        for chunk in self.chunks:
            response.write(chunk)
            await response.drain()
            await asyncio.sleep(0)
        response.end()


class Cluster:
    """A PrfaaS site with prefill p, a PD site with prefill l and decode d (and more by name), and a router."""

    def __init__(self) -> None:
        self.rooms: dict[int, Room] = {}
        self.servers: dict[str, FakeServer] = {}
        self.router: Router
        self.client: Client
        self.port = 0

    def __getitem__(self, name: str) -> FakeServer:
        return self.servers[name]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def request(
        self,
        target: str = "/v1/completions",
        body: bytes | dict[str, Any] | None = None,
        method: str = "POST",
        **headers: str,
    ) -> FetchedResponse:
        """One request to the router; keyword arguments are headers, with _ for -."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body or b""
        own = [(b"content-type", b"application/json")] if data else []
        own += [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        return await self.client.upstream(self.url).fetch(method, target, headers=own, body=data, timeout_s=DEADLINE_S)

    async def short(self, **headers: str) -> FetchedResponse:
        return await self.request(body={"model": MODEL, "prompt": "a b c"}, **headers)

    async def long(self, **headers: str) -> FetchedResponse:
        return await self.request(body={"model": MODEL, "prompt": "a " * 50}, **headers)

    async def all_up(self) -> None:
        await until(lambda: all(t.alive for t in self.router.registry.targets()), "all servers up")

    def down(self, name: str) -> bool:
        return not next(t for t in self.router.registry.targets() if t.name == name).alive


@contextlib.asynccontextmanager
async def cluster(
    prfaas: tuple[str, ...] = ("p",),
    local: tuple[str, ...] = ("l",),
    decode: tuple[str, ...] = ("d",),
    *,
    limits: RouterLimits | None = None,
    threshold_tokens: int = 10,
    allow_admin: bool = False,
    counter: TokenCounter | None = None,
    policy: PolicyConfig | None = None,
    hardware: dict[str, str] | None = None,
    links: dict[str, list[LinkConfig]] | None = None,
    loads: LoadSource | None = None,
    prefixes: PrefixLookup | None = None,
    kv_events: dict[str, tuple[str, str]] | None = None,
    prefix_index: PrefixIndexConfig | None = None,
    tenancy: TenancyConfig | None = None,
    tenants: list[TenantConfig] | None = None,
) -> AsyncIterator[Cluster]:
    """Everything up and healthy; closed at the end. t is 10 words."""
    hardware, links = hardware or {}, links or {}
    it = Cluster()
    sites = []
    named: tuple[tuple[str, SiteRole, tuple[str, ...]], ...] = (
        ("far", "prfaas", prfaas),
        ("home", "pd", (*local, *decode)),
    )
    for site, role, members in named:
        targets = []
        for name in members:
            kind: ServerRole = "decode" if name in decode else "prefill"
            server = it.servers[name] = FakeServer(name, kind, it.rooms)
            await server.listen()
            bootstrap = 9000 + len(it.servers) if kind == "prefill" else 0
            events, replay = (kv_events or {}).get(name, ("", ""))
            targets.append(
                TargetConfig(
                    name=name,
                    role=kind,
                    url=server.url,
                    bootstrap_port=bootstrap,
                    kv_events=events,
                    kv_replay=replay,
                )
            )
        if targets:
            sites.append(
                RouterSite(
                    name=site,
                    role=role,
                    servers=targets,
                    hardware=hardware.get(site, ""),
                    links=links.get(site, []),
                )
            )
    config = RouterConfig(
        router=RouterSection(model="/models/tiny", served_model_name=MODEL, allow_admin=allow_admin),
        sites=sites,
        policy=policy or PolicyConfig(threshold_tokens=threshold_tokens),
        limits=limits or RouterLimits(health_interval_s=0.05, drain_timeout_s=1.0),
        prefix_index=prefix_index or PrefixIndexConfig(),
        tenancy=tenancy or TenancyConfig(),
        tenants=tenants or [],
    )
    with open("/dev/null", "w") as sink:
        it.router = Router(config, counter or WordCounter(), AccessLog(sink), loads=loads, prefixes=prefixes)
        it.router.health.start()
        if it.router.feed is not None:
            it.router.feed.start()
        it.port = await it.router.server.start("127.0.0.1", 0)
        it.client = Client(ClientLimits(first_byte_timeout_s=DEADLINE_S))
        try:
            await it.all_up()
            yield it
        finally:
            await it.client.close()
            await it.router.stop()
            for server in it.servers.values():
                await server.stop()


def header(answer: FetchedResponse, name: str) -> str:
    """A response header's value, or an empty text."""
    return dict(answer.headers).get(name.encode(), b"").decode("latin-1")


async def raw_exchange(port: int, data: bytes, *, until_close: bool = True) -> bytes:
    """Bytes to a port, and all bytes that come back until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    try:
        return await asyncio.wait_for(reader.read() if until_close else reader.read(1 << 20), DEADLINE_S)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
