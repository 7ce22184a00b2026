"""What the proxy asks of a policy, and the policy with one threshold for good."""

from __future__ import annotations

from typing import Any, Protocol

from sglang_prfaas.config.schema import RouterConfig
from sglang_prfaas.core.request import RequestView
from sglang_prfaas.monitor.load_source import LoadSource
from sglang_prfaas.router.body import ParsedBody
from sglang_prfaas.router.line import Line
from sglang_prfaas.router.live_policy import LiveRouting
from sglang_prfaas.router.metrics import Gauge
from sglang_prfaas.router.prefixes import PrefixLookup, PrefixWriter
from sglang_prfaas.router.profile import router_profile
from sglang_prfaas.router.registry import Registry
from sglang_prfaas.router.tenancy import permitted
from sglang_prfaas.router.tokens import TokenCount
from sglang_prfaas.scheduler import Decision, decide
from sglang_prfaas.scheduler.short_term import LeastLoaded


class Flight(Protocol):
    """One attempt at a request, as far as the policy follows it."""

    def prefilled(self, now_s: float) -> None:
        """Prefill has answered."""

    def ended(self, now_s: float) -> None:
        """Nothing is awaited of prefill any more. May come again, and after `prefilled`."""


class RoutingPolicy(Protocol):
    """What the proxy asks."""

    @property
    def line(self) -> Line | None:
        """Where requests wait for prefill; None where they do not."""

    def decide(self, now_s: float, view: RequestView, body: ParsedBody) -> Decision:
        """Route one request, or one more attempt at it."""

    def begin(self, now_s: float, decision: Decision, tokens: TokenCount) -> Flight | None:
        """The request is sent."""

    def describe(self, now_s: float) -> dict[str, Any]:
        """What is in force, for `GET /policy`."""

    def gauges(self, now_s: float) -> list[Gauge]:
        """Figures for `/metrics`."""


def make_policy(config: RouterConfig, registry: Registry, loads: LoadSource, prefixes: PrefixLookup) -> RoutingPolicy:
    """The policy that the configuration asks for. Raises ConfigError for a profile that does not fit."""
    registry.observation.max_decode_requests = config.policy.max_decode_requests
    if not config.policy.is_live:
        return FixedPolicy(config, registry, prefixes)
    return LiveRouting(config, registry, router_profile(config), loads, prefixes)


class FixedPolicy:
    """One threshold for good."""

    line = None

    def __init__(self, config: RouterConfig, registry: Registry, prefixes: PrefixLookup) -> None:
        self._observation = registry.observation
        self._settings = config.policy
        self._prefixes = PrefixWriter(registry.observation, prefixes)
        self._least = LeastLoaded()

    def decide(self, now_s: float, view: RequestView, body: ParsedBody) -> Decision:
        self._prefixes.write(body)
        least = self._least if view.servers is None else None  # it knows whole sites
        return decide(permitted(self._observation, view), view, least=least)

    def begin(self, now_s: float, decision: Decision, tokens: TokenCount) -> Flight | None:
        return None

    def describe(self, now_s: float) -> dict[str, Any]:
        return {"mode": "fixed", "threshold_tokens": self._observation.t_tokens, "settings": self._settings}

    def gauges(self, now_s: float) -> list[Gauge]:
        return []
