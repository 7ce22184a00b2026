"""The live policy in the router: what it sees goes into the observation, every decision comes out of `scheduler.live`.

`LiveSource` is what it sees: the router's own accounting of each prefill server, reports where they are fresh, links.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from sglang_prfaas.config.schema import RouterConfig
from sglang_prfaas.core.request import RequestView, Route
from sglang_prfaas.monitor.load_source import LoadSource
from sglang_prfaas.router import policy_report, reported
from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.line import Line
from sglang_prfaas.router.metrics import Gauge
from sglang_prfaas.router.prefixes import PrefixLookup, PrefixWriter
from sglang_prfaas.router.profile import site_curve
from sglang_prfaas.router.registry import Registry, Target
from sglang_prfaas.router.tenancy import permitted
from sglang_prfaas.router.tokens import TokenCount
from sglang_prfaas.scheduler import Decision
from sglang_prfaas.scheduler.live import LivePolicy
from sglang_prfaas.scheduler.moment import Moment
from sglang_prfaas.scheduler.profiles import ProfileFile
from sglang_prfaas.scheduler.types import Figures, Observation

_LOOK_S_PER_SERVER = 1e-4
_FREE_SERVERS = 16
"""A digest of all servers may be this old for each server beyond these: looking must not cost more than deciding."""
_QUIET_WAIT_S = 0.1
"""Links and servers with more waiting than this, that we did not send, teach nothing about prefill."""


class LiveSource:
    """What can be seen of servers and links: own accounting, and reports that are fresh."""

    def __init__(self, config: RouterConfig, registry: Registry, loads: LoadSource, policy: LivePolicy) -> None:
        self._registry, self._loads, self._policy = registry, loads, policy
        self._settings = config.policy
        roles = {site.name: site.role for site in config.sites}
        self._links = {
            (site.name, link.to_site): reported.configured_link(link)
            for site in config.sites
            for link in site.links
            if roles.get(link.to_site) == "pd"
        }
        self.scarce = True
        self.servers = 0

    def refresh(self, now_s: float) -> None:
        """Bring the waits, decode loads and links of the observation to now."""
        staleness_s = self._settings.staleness_s
        self.servers = 0
        for target in self._registry.targets():
            self.servers += 1
            load = self._loads.server(target.site, target.name)
            if load is not None and load.age_s > staleness_s:
                load = None
            if target.role == "prefill":
                target.wait_s = target.queue.wait_s(now_s)
                if load is not None:
                    told_s = reported.reported_wait_s(load, partial(self._policy.prefill_s, target.site))
                    target.foreign_wait_s = max(0.0, told_s - target.wait_s)
                    target.wait_s += target.foreign_wait_s
                else:
                    target.foreign_wait_s = 0.0
            elif load is not None:
                target.extra_load = reported.reported_decode_load(
                    load, target.inflight_requests, self._settings.max_kv_occupancy
                )
            else:
                target.extra_load = 0.0
        self.scarce = False
        for pair, configured in self._links.items():
            link = self._loads.link(*pair)
            if link is None or link.age_s > staleness_s:
                self._registry.observation.links[pair] = configured
            else:
                self._registry.observation.links[pair] = reported.measured_link(link, configured)
                self.scarce |= reported.is_scarce(link, self._settings.max_link_utilisation)


class LiveRouting:
    """t follows lengths, queues and links."""

    def __init__(
        self,
        config: RouterConfig,
        registry: Registry,
        profile: ProfileFile,
        loads: LoadSource,
        prefixes: PrefixLookup,
    ) -> None:
        curves = {site.name: site_curve(profile, site.name, site.hardware) for site in config.sites}
        self.config, self.registry, self.profile = config, registry, profile
        self.observation = registry.observation
        self._prefixes = PrefixWriter(registry.observation, prefixes)
        self.live = LivePolicy(
            kv=profile.kv,
            local={site.name: curves[site.name] for site in config.sites if site.role == "pd"},
            prfaas={site.name: curves[site.name] for site in config.sites if site.role == "prfaas"},
            settings=config.policy,
        )
        self.source = LiveSource(config, registry, loads, self.live)
        self.line = Line(self) if config.policy.is_ordered else None
        self.sending_bytes: dict[tuple[str, str], float] = {}
        """KVCache of requests that a PrfaaS site has in work, by link."""
        self._moment = Moment(float("-inf"), {}, {})

    @property
    def look_interval_s(self) -> float:
        """How old a digest of all servers may be."""
        return _LOOK_S_PER_SERVER * max(0, self.source.servers - _FREE_SERVERS)

    def look(self, now_s: float, oldest_s: float = 0.0) -> Moment:
        """A digest of all servers and links that is at most `oldest_s` old."""
        if now_s - self._moment.now_s >= oldest_s:
            self.source.refresh(now_s)
            held_s = self.line.held_s(now_s) if self.line is not None and len(self.line) else {}
            for site in self.observation.sites:
                site.held_s = held_s.get(site.name, 0.0)
            self.observation.bandwidth_scarce = self.source.scarce or not self._prefixes.fetches
            self._moment = self.live.look(now_s, self.observation)
        return self._moment

    def decide(self, now_s: float, view: RequestView, body: ParsedBody) -> Decision:
        self._prefixes.write(body)
        moment, observation = self._seen(now_s, view)
        return self.live.decide(moment, observation, view)

    def _seen(self, now_s: float, view: RequestView) -> tuple[Moment, Observation]:
        """What a request may be decided on: the sites that its tenant may use, and servers with its LoRA adapter."""
        if view.sites is None and view.servers is None:
            return self.look(now_s, self.look_interval_s), self.observation
        observation = permitted(self.observation, view)
        return self.live.look(now_s, observation), observation

    def bind(
        self, now_s: float, view: RequestView, body: ParsedBody, home: str, decision: Decision, route: Route
    ) -> Decision:
        """Servers of now for a request that waited, on the path that had room first. Without any: a new decision."""
        self._prefixes.write(body)
        moment, observation = self._seen(now_s, view)
        bound = self.live.bind(moment, observation, msgspec.structs.replace(view, forced=route), home)
        if bound.prefill is None or bound.decode is None:
            return self.live.decide(moment, observation, view)
        moved = route != decision.route
        return msgspec.structs.replace(
            decision,
            route=route,
            prefill=bound.prefill,
            decode=bound.decode,
            reason=f"{decision.reason}; the other path was free first" if moved else decision.reason,
            reason_class="idle" if moved else decision.reason_class,
        )

    def link_s(self, home: str) -> float:
        """Seconds that the least loaded link to a PD site needs for what is ready and what is being computed."""
        least_s = float("inf")
        for (site, to), link in self.observation.links.items():
            if to == home and link.bytes_per_s > 0:
                least_s = min(least_s, max(link.wait_s, self.sending_bytes.get((site, to), 0.0) / link.bytes_per_s))
        return 0.0 if least_s == float("inf") else least_s

    def link_bytes_per_s(self, home: str) -> float:
        """What all links to a PD site carry together; infinite where none is known."""
        found = [link.bytes_per_s for (_, to), link in self.observation.links.items() if to == home]
        return max(1.0, sum(found)) if found else float("inf")

    def increment_bytes(self, tokens: TokenCount, figures: Figures) -> float:
        """KVCache that PrfaaS would send of a request, of a batch all of it."""
        held = tokens.longest - figures.local_tokens
        prompts = max(1.0, tokens.total / max(1, tokens.longest))
        return prompts * self.profile.kv.increment_bytes(tokens.longest, held)

    def begin(self, now_s: float, decision: Decision, tokens: TokenCount) -> Flight:
        target, figures = decision.prefill, decision.figures
        assert isinstance(target, Target)
        assert figures is not None
        far = decision.route == "prfaas"
        to_compute = figures.prfaas_tokens if far else figures.local_tokens
        held = tokens.longest - figures.local_tokens
        pair = (target.site, figures.pd_site) if far else None
        return Flight(self, target, now_s, to_compute, tokens, pair, held, self.increment_bytes(tokens, figures))

    def describe(self, now_s: float) -> dict[str, Any]:
        return policy_report.describe(self, now_s)

    def gauges(self, now_s: float) -> list[Gauge]:
        return policy_report.gauges(self, now_s)


class Flight:
    """Keeps the queue of its prefill server, and learns from its end."""

    __slots__ = ("_bytes", "_number", "_pair", "_policy", "_target", "_teaches", "_tokens")

    def __init__(
        self,
        policy: LiveRouting,
        target: Target,
        now_s: float,
        to_compute: int,
        tokens: TokenCount,
        pair: tuple[str, str] | None,
        held: int,
        increment_bytes: float,
    ) -> None:
        """pair: the link that its KVCache crosses, `increment_bytes` of it."""
        live = policy.live
        link = policy.observation.links.get(pair) if pair is not None else None
        work_s = live.prefill_s(target.site, float(to_compute))
        after_s = live.exposed_s(link, tokens.longest, held, work_s)
        self._policy, self._target, self._tokens = policy, target, to_compute
        self._teaches = (
            tokens.total == tokens.longest > 0
            and target.foreign_wait_s < _QUIET_WAIT_S
            and (link is None or not (link.congested or link.wait_s > _QUIET_WAIT_S))
        )
        prompts = max(1.0, tokens.total / max(1, tokens.longest))
        work_s *= prompts
        self._number = target.queue.add(now_s, work_s, after_s, round(to_compute * prompts))
        target.set_wait(target.wait_s + work_s)
        self._pair, self._bytes = pair, 0.0
        if pair is not None:
            self._bytes = increment_bytes
            policy.sending_bytes[pair] = policy.sending_bytes.get(pair, 0.0) + self._bytes

    def prefilled(self, now_s: float) -> None:
        busy_s = self._target.queue.finish(now_s, self._number)
        self._target.set_wait(self._target.queue.wait_s(now_s) + self._target.foreign_wait_s)
        if busy_s is not None and self._teaches and self._policy.config.policy.correct_profile:
            self._policy.live.learn(now_s, self._target.site, float(self._tokens), busy_s)
        self._left()

    def ended(self, now_s: float) -> None:
        self._target.queue.drop(now_s, self._number)
        self._left()

    def _left(self) -> None:
        if self._pair is not None:
            self._policy.sending_bytes[self._pair] -= self._bytes
            self._bytes = 0.0
        if self._policy.line is not None:
            self._policy.line.changed()
