"""Policies to compare. Each gives the threshold; `scheduler.decide` makes every decision with it."""

from __future__ import annotations

from typing import Protocol

from sglang_prfaas.scheduler.threshold import NOTHING_OFFLOADED, LiveState, ThresholdController


class Policy(Protocol):
    """The source of t."""

    @property
    def live(self) -> bool:
        """Whether `t_tokens` looks at the state."""

    def observe(self, now_s: float, local_tokens: int, prfaas_tokens: int) -> None:
        """A request came in."""

    def t_tokens(self, state: LiveState, local_tokens: int, prfaas_tokens: int) -> int:
        """The threshold for the next decision."""


class StaticThreshold:
    """One t for good. 0: everything goes to PrfaaS (naive heterogeneous)."""

    live = False

    def __init__(self, t_tokens: int) -> None:
        self._t_tokens = t_tokens

    def observe(self, now_s: float, local_tokens: int, prfaas_tokens: int) -> None:
        """Nothing to learn."""

    def t_tokens(self, state: LiveState, local_tokens: int, prfaas_tokens: int) -> int:
        return self._t_tokens


def homogeneous() -> StaticThreshold:
    """Nothing is offloaded."""
    return StaticThreshold(NOTHING_OFFLOADED)


def naive() -> StaticThreshold:
    """Everything is offloaded."""
    return StaticThreshold(0)


class LiveThreshold:
    """Ours: the production controller."""

    live = True

    def __init__(self, controller: ThresholdController) -> None:
        self._controller = controller

    def observe(self, now_s: float, local_tokens: int, prfaas_tokens: int) -> None:
        self._controller.observe(now_s, local_tokens, prfaas_tokens)

    def t_tokens(self, state: LiveState, local_tokens: int, prfaas_tokens: int) -> int:
        return self._controller.choose(state, local_tokens, prfaas_tokens).t_tokens
