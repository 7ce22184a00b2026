"""Policies to compare: one threshold for good, and the production policy."""

from __future__ import annotations

from math import ceil
from typing import Protocol

from sglang_prfaas.core.request import RequestView
from sglang_prfaas.scheduler import Decision, Observation, decide
from sglang_prfaas.scheduler.live import LivePolicy
from sglang_prfaas.scheduler.moment import Moment, SiteLoad
from sglang_prfaas.scheduler.threshold import NOTHING_OFFLOADED, LiveState


class Policy(Protocol):
    """Decides, and hears what prefills took."""

    @property
    def live(self) -> bool:
        """Whether `decide` looks at the state."""

    def decide(self, state: LiveState, observation: Observation, request: RequestView) -> Decision:
        """Route one request."""

    def learn(self, now_s: float, site: str, tokens: int, measured_s: float) -> None:
        """A prefill of `tokens` took `measured_s` of a server of `site`."""


class StaticThreshold:
    """One t for good. 0: everything goes to PrfaaS (naive heterogeneous)."""

    live = False

    def __init__(self, t_tokens: int) -> None:
        self._t_tokens = t_tokens

    def decide(self, state: LiveState, observation: Observation, request: RequestView) -> Decision:
        observation.t_tokens = self._t_tokens
        return decide(observation, request)

    def learn(self, now_s: float, site: str, tokens: int, measured_s: float) -> None:
        """Nothing to learn."""


def homogeneous() -> StaticThreshold:
    """Nothing is offloaded."""
    return StaticThreshold(NOTHING_OFFLOADED)


def naive() -> StaticThreshold:
    """Everything is offloaded."""
    return StaticThreshold(0)


class LiveThreshold:
    """Ours: the router's own object."""

    live = True

    def __init__(self, policy: LivePolicy) -> None:
        self._policy = policy

    def decide(self, state: LiveState, observation: Observation, request: RequestView) -> Decision:
        loads = {}
        for site in observation.sites:
            path = state.local if site.role == "pd" else state.prfaas
            loads[site.name] = SiteLoad(ceil(path.servers), path.wait_s, 0.0)
        states = {site.name: state for site in observation.sites if site.role == "pd"}
        return self._policy.decide(Moment(state.now_s, loads, states), observation, request)

    def learn(self, now_s: float, site: str, tokens: int, measured_s: float) -> None:
        self._policy.learn(now_s, site, tokens, measured_s)
