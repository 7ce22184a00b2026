"""Asking running routers and agents, by the files that describe them or by URL, with the site's keys where needed."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from msgspec import Struct

from sglang_prfaas.config import load
from sglang_prfaas.config.addresses import url_problem
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.core.addresses import base_url
from sglang_prfaas.errors import ConfigError, LaunchError

TIMEOUT_S = 10.0


class Endpoint(Struct, frozen=True):
    """Where a router or an agent answers. keys, site: whose certificate an agent with TLS has to show; else None."""

    url: str
    keys: TransportConfig | None = None
    site: str = ""


def endpoint_of(target: str) -> Endpoint:
    """The endpoint of a TOML file or a URL. Raises ConfigError."""
    if "://" in target:
        if problem := url_problem(target):
            raise ConfigError(problem)
        return Endpoint(target.rstrip("/"))
    if load.kind_of(target) == "router":
        router = load.load_router(target).router
        return Endpoint(_url("http", router.host, router.port))
    config = load.load_site(target)
    agent = config.agent
    if not agent.port:
        raise ConfigError(f"{target}: agent.port: the site has no agent to ask; write a port")
    if not agent.tls:
        return Endpoint(_url("http", agent.host, agent.port))
    return Endpoint(_url("https", agent.host, agent.port), config.transport, config.site.name)


def ask(endpoint: Endpoint, path: str, *, statuses: tuple[int, ...] = (200,)) -> Any:
    """The JSON that `GET path` answers. statuses: those whose answer counts. Raises LaunchError, ConfigError."""
    from sglang_prfaas.http.errors import UpstreamError

    try:
        status, body = asyncio.run(_get(endpoint, path))
    except UpstreamError as error:
        raise LaunchError(f"{endpoint.url}{path}: {error}; is it running?") from error
    if status not in statuses:
        raise LaunchError(f"{endpoint.url}{path} answered {status}; is it a router or an agent of this version?")
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise LaunchError(f"{endpoint.url}{path}: no JSON, {error}; is it a router or an agent?") from error


async def _get(endpoint: Endpoint, path: str) -> tuple[int, bytes]:
    from sglang_prfaas.http import Client
    from sglang_prfaas.transport.security import SiteTls, load_security

    client = Client()
    try:
        if endpoint.keys is not None:
            client.require(endpoint.url, SiteTls(load_security(endpoint.keys), listens=False, site=endpoint.site))
        answer = await client.upstream(endpoint.url).fetch("GET", path, timeout_s=TIMEOUT_S)
        return answer.status, answer.body
    finally:
        await client.close()


def _url(scheme: str, host: str, port: int) -> str:
    from sglang_prfaas.site.commands import listening_host

    return base_url(scheme, listening_host(host), port)
