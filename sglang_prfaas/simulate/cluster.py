"""What is simulated: sites, curves, link, caches, and what goes wrong when."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.throughput import Fleet

FaultKind = Literal["link_gbps", "kill_prfaas", "revive_prfaas"]


class Fault(Struct, frozen=True):
    """Something that changes at a time. `value`: the link's new Gbps, or how many PrfaaS servers."""

    at_s: float
    kind: FaultKind
    value: float


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
    order_slack: float = 0.0
    """Order of prefill queues: by arrival plus this many times the prefill time. 0: first come, first served."""
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
        """Raises ConfigError for a mix of roles that the site does not have."""
        if not 0 <= self.n_p < self.fleet.n_pd:
            raise ConfigError(
                f"N_p {self.n_p} must be at least 0 and below the {self.fleet.n_pd} instances of the site"
            )
        if not self.fleet.n_prfaas and self.n_p == 0:
            raise ConfigError("without PrfaaS servers, N_p must be above 0")
        for fault in self.faults:
            if fault.kind != "link_gbps" and not 0 <= fault.value <= self.fleet.n_prfaas:
                raise ConfigError(f"{fault.kind} {fault.value:.0f} at {fault.at_s} s: there are {self.fleet.n_prfaas}")
