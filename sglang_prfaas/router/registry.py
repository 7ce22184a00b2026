"""The servers the router knows, their roles and their state: one mutable registry behind all decisions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from sglang_prfaas.config.schema import RouterConfig, RouterSite, ServerRole
from sglang_prfaas.errors import PeerError
from sglang_prfaas.http import Client, Upstream
from sglang_prfaas.monitor.reports import ConfiguredLink, SiteState
from sglang_prfaas.router.link_check import LinkCheck
from sglang_prfaas.scheduler.prefill_queue import PrefillQueue
from sglang_prfaas.scheduler.types import Observation, ServerView, SiteView

log = logging.getLogger(__name__)


class Target(ServerView, kw_only=True, eq=False):
    """A server as the scheduler sees it, and how the router reaches it.

    Loads, role and state change here only, and by `LiveSource.refresh` before a look: `within.version` says so."""

    within: SiteView
    upstream: Upstream
    bootstrap_host: str = ""
    bootstrap_port: int = 0
    offered: bool = True  # False: its agent says that it is starting, draining or down
    healthy: bool = False  # by our own checks
    failures: int = 0  # failed checks in a row
    error: str = "not checked yet"
    models: frozenset[str] | None = None  # names of the base model that it lists; None: not known yet
    adapters: frozenset[str] = frozenset()  # LoRA adapters that it lists
    adapter_ids: dict[str, str] = msgspec.field(default_factory=dict)  # SGLang's ids of adapters, as its agent tells
    queue: PrefillQueue = msgspec.field(default_factory=PrefillQueue)  # what live routing has sent it
    foreign_wait_s: float = 0.0  # part of wait_s that reports say and we did not send
    probe_now: Any = msgspec.field(default_factory=asyncio.Event)

    def add_load(self, requests: int, tokens: int = 0) -> None:
        """Requests, and uncached prompt tokens, that it has in work from now on; negative: not any more."""
        self.inflight_requests += requests
        self.inflight_tokens += tokens
        self.within.version += 1

    def set_wait(self, wait_s: float) -> None:
        """Seconds until prefill has worked off its queue."""
        self.wait_s = wait_s
        self.within.version += 1

    def set_role(self, role: ServerRole) -> None:
        """The role that its agent says it has."""
        self.role = role
        self.within.version += 1

    def update_alive(self) -> None:
        """Alive: offered by its agent and healthy by our checks."""
        alive = self.offered and self.healthy
        if alive != self.alive:
            self.alive = alive
            self.within.version += 1
            if not alive:
                self.models = None  # what it had loaded it may come back without
            why = "" if alive else f": {self.error}" if self.offered else ": not offered by its agent"
            log.log(
                logging.INFO if alive else logging.WARNING,
                "%s/%s (%s) is %s%s",
                self.site,
                self.name,
                self.role,
                "up" if alive else "down",
                why,
            )

    def mark_healthy(self) -> None:
        self.failures = 0
        self.healthy = True
        self.error = ""
        self.update_alive()

    def mark_failed(self, error: str, *, unhealthy_after: int = 1) -> None:
        """A failed check, or a request that could not reach the server (out at once, and checked at once)."""
        self.failures += 1
        self.error = error
        if self.failures >= unhealthy_after:
            self.healthy = False
            self.update_alive()

    def suspect(self, error: str) -> None:
        """A request could not reach the server: out at once, until a check succeeds."""
        self.mark_failed(error)
        self.probe_now.set()


class AgentServer(Struct):
    """One server in an agent's list. `url` (optional) is reached directly instead of through the agent's path."""

    name: str
    role: ServerRole
    state: str = "ready"
    path: str = ""
    url: str = ""
    bootstrap_host: str = ""
    bootstrap_port: int = 0
    adapter_ids: dict[str, str] = {}


class AgentSite(Struct):
    """What `GET {agent_url}/site` answers; unknown keys are ignored."""

    name: str
    servers: list[AgentServer]
    role: str = ""
    model: str = ""
    configured_links: list[ConfiguredLink] | None = None


class Registry:
    """Sites and servers from config and agents; `observation` is what decisions are made on."""

    def __init__(self, config: RouterConfig, client: Client) -> None:
        self.client = client
        self._sites: dict[str, SiteView] = {}
        self._link_check = LinkCheck()
        self.observation = Observation(sites=[], t_tokens=config.policy.threshold_tokens)
        for site in config.sites:
            view = SiteView(name=site.name, role=site.role, servers=[])
            self._sites[site.name] = view
            self.observation.sites.append(view)
            for server in site.servers:
                self._add(
                    view,
                    AgentServer(
                        name=server.name,
                        role=server.role,
                        url=server.url,
                        bootstrap_host=server.bootstrap_host,
                        bootstrap_port=server.bootstrap_port,
                    ),
                )

    def targets(self) -> Iterator[Target]:
        """All servers of all sites."""
        for site in self.observation.sites:
            for server in site.servers:
                assert isinstance(server, Target)
                yield server

    def apply_agent(self, site: RouterSite, answer: bytes) -> None:
        """Take over an agent's list: new servers, changed roles, addresses and states, and servers that are gone.

        Raises PeerError for an answer that is not one, or is of another site.
        """
        try:
            listed = msgspec.json.decode(answer, type=AgentSite)
        except msgspec.DecodeError as exc:
            raise PeerError(f"the agent of {site.name} at {site.agent_url} answered wrongly: {exc}") from exc
        self._apply(site, listed)

    def apply_state(self, site: RouterSite, state: SiteState) -> None:
        """Take over what an agent reports by itself, as `apply_agent` does its list. Raises PeerError."""
        try:
            listed = msgspec.convert(state, AgentSite, from_attributes=True)
        except msgspec.ValidationError as exc:
            raise PeerError(f"the agent of {site.name} reports wrongly: {exc}") from exc
        self._apply(site, listed)

    def _apply(self, site: RouterSite, listed: AgentSite) -> None:
        if listed.name != site.name:
            raise PeerError(f"the agent at {site.agent_url} is of site {listed.name}, expected {site.name}")
        if listed.configured_links is not None:
            self._link_check.told(site, listed.configured_links)
        view = self._sites[site.name]
        known = {server.name: server for server in view.servers}
        for entry in listed.servers:
            url = entry.url or site.agent_url.rstrip("/") + entry.path
            found = known.pop(entry.name, None)
            if found is None:
                self._add(view, msgspec.structs.replace(entry, url=url))
                continue
            assert isinstance(found, Target)
            if found.role != entry.role:
                log.info("%s/%s changed its role from %s to %s", site.name, entry.name, found.role, entry.role)
                found.set_role(entry.role)
            upstream = self.client.upstream(url)
            found.upstream = upstream
            found.bootstrap_host = entry.bootstrap_host or upstream.host
            found.bootstrap_port = entry.bootstrap_port
            found.adapter_ids = entry.adapter_ids
            offered = entry.state == "ready"
            if offered and not found.offered:
                found.probe_now.set()
            found.offered = offered
            found.update_alive()
        for gone in known.values():
            log.info("%s/%s is no longer listed by its agent", site.name, gone.name)
            gone.alive = False
            view.servers.remove(gone)
            view.version += 1

    def _add(self, view: SiteView, entry: AgentServer) -> None:
        upstream = self.client.upstream(entry.url)
        view.version += 1
        view.servers.append(
            Target(
                within=view,
                site=view.name,
                name=entry.name,
                role=entry.role,
                upstream=upstream,
                bootstrap_host=entry.bootstrap_host or upstream.host,
                bootstrap_port=entry.bootstrap_port,
                adapter_ids=entry.adapter_ids,
                offered=entry.state == "ready",
            )
        )
