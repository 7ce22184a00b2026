"""What the router asks of a prefix index, and where the answer goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.metrics import Gauge
from sglang_prfaas.scheduler.types import Observation, SitePrefix


class PrefixLookup(Protocol):
    """Which site holds how much of a prompt. Asked once for each request, in the event loop: it must be quick."""

    @property
    def fetches(self) -> bool:
        """Whether a prefix that only the other site holds is fetched over the link, where bandwidth is ample."""

    def wants(self, body: ParsedBody, estimate: Callable[[], int]) -> bool:
        """Whether `match` needs the exact tokens of this prompt in the body. `estimate`: how many there may be."""

    def match(self, body: ParsedBody) -> Mapping[str, SitePrefix]:
        """Cached prefix of the prompt by site; sites without any may be left out. Of a batch: its longest prompt."""

    def looked_up(self, body: ParsedBody, held: bool) -> None:
        """A request with its tokens was routed; `held`: some server has a part of its prompt."""

    def told(self, body: ParsedBody, site: str, server: str, promised: int, cached: int) -> None:
        """A prefill server told how many tokens of the prompt it had cached; `promised`: by `match`."""

    def gauges(self) -> list[Gauge]:
        """Figures for `/metrics`."""

    def describe(self) -> dict[str, Any]:
        """For `GET /cache`."""


class NoPrefixes:
    """No index: nothing is known to be cached."""

    fetches = False

    def wants(self, body: ParsedBody, estimate: Callable[[], int]) -> bool:
        return False

    def match(self, body: ParsedBody) -> Mapping[str, SitePrefix]:
        return {}

    def looked_up(self, body: ParsedBody, held: bool) -> None:
        """Nothing is counted."""

    def told(self, body: ParsedBody, site: str, server: str, promised: int, cached: int) -> None:
        """Nothing is learnt."""

    def gauges(self) -> list[Gauge]:
        return []

    def describe(self) -> dict[str, Any]:
        return {"enabled": False}


class PrefixWriter:
    """Writes what is cached of a request into the observation."""

    def __init__(self, observation: Observation, lookup: PrefixLookup) -> None:
        self._observation, self._lookup = observation, lookup
        self._written = False

    @property
    def fetches(self) -> bool:
        return self._lookup.fetches

    def write(self, body: ParsedBody) -> None:
        held = self._lookup.match(body)
        if not held and not self._written:
            return
        self._written = bool(held)
        for site in self._observation.sites:
            prefix = held.get(site.name)
            site.cached_tokens = prefix.cached_tokens if prefix is not None else 0
            roles = {server.name: server.role for server in site.servers if server.alive} if prefix else {}
            servers = prefix.servers.items() if prefix is not None else ()
            site.affinity = {name: n for name, n in servers if roles.get(name) == "prefill"}
            site.decode_affinity = {name: n for name, n in servers if roles.get(name) == "decode"}
