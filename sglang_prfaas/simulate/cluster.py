"""What is simulated: sites, curves, link, caches, and what goes wrong when."""

from __future__ import annotations

from typing import Literal, get_args

from msgspec import Struct

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.throughput import Fleet

FaultKind = Literal[
    "link_gbps",
    "link_loss",
    "kill_prfaas",
    "revive_prfaas",
    "kill_prefill",
    "revive_prefill",
    "kill_decode",
    "revive_decode",
]
FAULT_KINDS: tuple[FaultKind, ...] = get_args(FaultKind)


class Fault(Struct, frozen=True):
    """Something that changes at a time. `value`: the link's new Gbps or loss (a share), or how many servers.

    prfaas: servers of the PrfaaS site. prefill, decode: servers of the PD site that have that role then.
    """

    at_s: float
    kind: FaultKind
    value: float


class RoleChangeCost(Struct, frozen=True, kw_only=True):
    """What carrying out a role change takes, beside the drain, which takes as long as the server's work."""

    switch_s: float = 20.0
    """Out of rotation after the drain: the switch itself and the health check."""
    drain_timeout_s: float = 120.0
    """A server that still has work then goes back into its old role."""
    fails: int = 0
    """The first so many switches fail, and the server is back in its old role after `switch_s`."""


class Cluster(Struct, frozen=True, kw_only=True):
    """One PrfaaS site, one PD site and the link between them.

    N_p may have a fraction: then one more instance of the PD site does both. Prefill is sure of that share of its time,
    and has whatever decode leaves beyond it. A decode step takes time in proportion to its batch there, as the
    capacity N_d of a fraction in eq. 5 assumes; with steps that cost more at small batches, sharing gains less.
    """

    fleet: Fleet
    n_p: float
    slo_tokens_per_s: float
    rtt_s: float = 0.0
    cache_blocks: int = 0
    """Prefix cache of either site, in blocks."""
    fetch_prefixes: bool = False
    """Where the link has room, a prefix that only the other site holds is fetched from it (PrfaaS section 3.4.3)."""
    ttft_slo_s: float = 0.0
    """Requests wait in front of the servers, in the order of `scheduler.dispatch`. 0: at them, in order of arrival."""
    dispatch_lead_s: float = 0.1
    """With a TTFT objective, a server has room when its work ends within so long, so that it never runs dry."""
    connections: int = 64
    """TCP connections of the link; loss slows each of them."""
    role_changes: RoleChangeCost | None = None
    """None: roles stay as they are."""
    faults: tuple[Fault, ...] = ()

    @property
    def shared(self) -> float:
        """The share of the time-shared instance that prefill has; 0 where no instance is shared."""
        return round(self.n_p - int(self.n_p), 9)

    @property
    def whole_decode(self) -> int:
        """Instances that only decode."""
        return self.fleet.n_pd - int(self.n_p) - (1 if self.shared else 0)

    def check(self) -> None:
        """Raises ConfigError for a mix of roles or a fault that the sites cannot have."""
        if not 0 <= self.n_p < self.fleet.n_pd:
            raise ConfigError(
                f"N_p {self.n_p} must be at least 0 and below the {self.fleet.n_pd} instances of the site"
            )
        if not self.fleet.n_prfaas and self.n_p == 0:
            raise ConfigError("without PrfaaS servers, N_p must be above 0")
        if self.role_changes is not None and (self.shared or self.n_p < 1):
            raise ConfigError(f"role changes need whole instances of both roles, got N_p {self.n_p}")
        for fault in self.faults:
            if fault.kind == "link_loss" and not 0 <= fault.value < 1:
                raise ConfigError(f"link_loss {fault.value} at {fault.at_s} s: must be a share below 1")
            there = self.fleet.n_prfaas if fault.kind.endswith("_prfaas") else self.fleet.n_pd
            if not fault.kind.startswith("link_") and not 0 <= fault.value <= there:
                raise ConfigError(f"{fault.kind} {fault.value:.0f} at {fault.at_s} s: there are {there}")
