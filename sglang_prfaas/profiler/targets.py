"""The servers to profile: from configuration files of sites or of a router, or named by URL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from sglang_prfaas import env
from sglang_prfaas.config import load
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.core.addresses import base_url
from sglang_prfaas.errors import ConfigError, PeerError
from sglang_prfaas.http import Client, UpstreamError
from sglang_prfaas.profiler.sglang_api import ServerApi, ServerInfo

Role = Literal["prefill", "decode"]
_ASK_S = 10.0


class Place(Struct, frozen=True, kw_only=True):
    """Where to look for servers: an agent, or one server. hardware: the name that curves get."""

    site: str
    hardware: str
    url: str
    role: Role | None = None
    """None: an agent, which lists its servers."""
    server: str = ""
    bootstrap_host: str = ""
    bootstrap_port: int = 0


class Found(Struct, frozen=True, kw_only=True):
    """What the files and flags name."""

    places: list[Place]
    model: str
    """Path of the model, as files name it; may be empty."""
    transfer_log: str
    """As a site's file names it; may be empty."""


class Target(Struct, kw_only=True):
    """One server that answers, and what it said of itself."""

    site: str
    server: str
    hardware: str
    role: Role
    api: ServerApi
    info: ServerInfo
    bootstrap_host: str = ""
    bootstrap_port: int = 0

    @property
    def name(self) -> str:
        return f"{self.site}/{self.server}"


class _Listed(Struct):
    name: str
    role: Role
    state: str = "ready"
    path: str = ""
    url: str = ""
    bootstrap_host: str = ""
    bootstrap_port: int = 0


class _Listing(Struct):
    name: str
    servers: list[_Listed]


def places_of(files: Sequence[str], named: Sequence[tuple[Role, str]], hardware: Mapping[str, str]) -> Found:
    """Where to look. named: role and NAME=URL; hardware: names of sites' curves, over those of the files.

    Raises ConfigError.
    """
    places: list[Place] = []
    model, log = "", ""
    for file in files:
        if load.kind_of(file) == "site":
            config = load.load_site(file)
            places += _site_places(config)
            model, log = model or config.site.model, log or _transfer_log(config)
        else:
            router = load.load_router(file)
            model = model or router.router.model
            for site in router.sites:
                curve = site.hardware or site.name
                if site.agent_url:
                    places.append(Place(site=site.name, hardware=curve, url=site.agent_url))
                for server in site.servers:
                    places.append(
                        Place(
                            site=site.name,
                            hardware=curve,
                            url=server.url,
                            role=server.role,
                            server=server.name,
                            bootstrap_host=server.bootstrap_host,
                            bootstrap_port=server.bootstrap_port,
                        )
                    )
    for role, text in named:
        name, equals, url = text.partition("=")
        if not equals or not name or urlsplit(url).scheme not in ("http", "https"):
            raise ConfigError(f"--{role} {text}: must be NAME=URL, such as H200=http://10.1.0.11:30000")
        places.append(Place(site=name, hardware=name, url=url, role=role, server=role))
    if not places:
        raise ConfigError("no servers to profile: give the router's FILE, the sites' FILEs, or --prefill and --decode")
    if unknown := sorted(hardware.keys() - {place.site for place in places}):
        sites = ", ".join(dict.fromkeys(place.site for place in places))
        raise ConfigError(f"--hardware {unknown[0]}=...: there is no such site, only {sites}")
    places = [msgspec.structs.replace(place, hardware=hardware.get(place.site, place.hardware)) for place in places]
    return Found(places=list(dict.fromkeys(places)), model=model, transfer_log=log)


def _site_places(config: SiteConfig) -> list[Place]:
    site, agent = config.site.name, config.agent
    if agent.port:
        scheme = "https" if agent.tls else "http"
        return [Place(site=site, hardware=site, url=base_url(scheme, _reachable(agent.host), agent.port))]
    return [
        Place(
            site=site,
            hardware=site,
            url=base_url("http", _reachable(server.host), server.port),
            role=server.role,
            server=server.name,
            bootstrap_host=config.transport.advertise_host,
            bootstrap_port=server.bootstrap_port,
        )
        for server in config.servers
    ]


def _reachable(host: str) -> str:
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _transfer_log(config: SiteConfig) -> str:
    named = [config.site.env, *(server.env for server in config.servers)]
    return next((path for names in named if (path := names.get(env.TRANSFER_LOG))), "")


async def find_targets(
    client: Client, places: Sequence[Place], headers: Sequence[tuple[bytes, bytes]] = ()
) -> list[Target]:
    """Ask every agent for its servers, and every server what it is.

    Raises PeerError where one is down or has another role than it should, and where they serve different models.
    """
    targets: list[Target] = []
    for place in places:
        for entry in [place] if place.role else await _listed(client, place):
            assert entry.role is not None
            api = ServerApi(client, entry.url, headers)
            try:
                info = await api.info()
            except UpstreamError as error:
                raise PeerError(
                    f"{entry.site}/{entry.server} ({entry.role}): {error}; start it, or leave it out"
                ) from error
            if info.mode not in ("plain", entry.role):
                raise PeerError(
                    f"{entry.site}/{entry.server} at {entry.url} is a {info.mode} server, expected {entry.role}; give "
                    f"it with --{info.mode}, or correct its role in the file"
                )
            host = entry.bootstrap_host or urlsplit(entry.url).hostname or ""
            targets.append(
                Target(
                    site=entry.site,
                    server=entry.server,
                    hardware=entry.hardware,
                    role=entry.role,
                    api=api,
                    info=info,
                    bootstrap_host=host,
                    bootstrap_port=entry.bootstrap_port,
                )
            )
    _same_model(targets)
    return targets


async def _listed(client: Client, place: Place) -> list[Place]:
    url = place.url.rstrip("/")
    try:
        answer = await client.upstream(url).fetch("GET", "/site", timeout_s=_ASK_S)
    except UpstreamError as error:
        raise PeerError(f"agent of {place.site}: {error}; start the site, or correct its agent's address") from error
    try:
        listing = msgspec.json.decode(answer.body, type=_Listing)
    except msgspec.DecodeError as error:
        raise PeerError(f"{url}/site is not the list of an agent (status {answer.status}): {error}") from error
    if place.site != listing.name:
        raise PeerError(f"the agent at {url} is of site {listing.name}, expected {place.site}")
    ready = [server for server in listing.servers if server.state == "ready"]
    if not ready:
        states = ", ".join(f"{server.name} {server.state}" for server in listing.servers)
        raise PeerError(f"site {place.site} has no server that is ready ({states}); wait until one is")
    return [
        Place(
            site=place.site,
            hardware=place.hardware,
            url=server.url or url + server.path,
            role=server.role,
            server=server.name,
            bootstrap_host=server.bootstrap_host,
            bootstrap_port=server.bootstrap_port,
        )
        for server in ready
    ]


def _same_model(targets: Sequence[Target]) -> None:
    first = targets[0]
    for other in targets[1:]:
        for what in ("architecture", "model_name"):
            ours, theirs = (_last(getattr(target.info, what)) for target in (first, other))
            if ours != theirs:
                raise PeerError(
                    f"{first.name} and {other.name} serve different models: {what} {ours!r} and {theirs!r}; one "
                    "profile is of one model"
                )


def _last(name: str) -> str:
    return Path(name).name if "/" in name else name
