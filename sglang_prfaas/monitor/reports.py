"""What monitors say: loads of servers and state of links, as plain values that go from movers and agents to routers.

Figures are as measured by whoever sends them, with their age at that moment: clocks of two machines are never compared.
"""

from __future__ import annotations

from msgspec import Struct


class ServerLoad(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Load of one SGLang server, prefill or decode, over all of its ranks. Queues in requests."""

    server: str
    role: str = ""
    running: int = 0
    waiting: int = 0
    """Requests that wait to be computed."""
    prealloc: int = 0
    """Decode: requests that wait for pages. Prefill: requests that wait for decode to ask for them."""
    transferring: int = 0
    """Requests whose KVCache is on its way, in or out."""
    waiting_uncached_tokens: int = 0
    """Prompt tokens of waiting requests that prefill has to compute."""
    kv_tokens_used: int = 0
    kv_tokens_total: int = 0
    prefill_tokens_per_s: float = 0.0
    """Uncached prompt tokens computed for each second in which prefill was busy."""
    decode_tokens_per_s: float = 0.0
    step_s: float = 0.0
    """Mean time of a decode step."""
    busy_fraction: float = 0.0
    """Share of the last interval in which it computed."""
    age_s: float = 0.0
    """How old the figures were when they were sent."""


class LinkLoad(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One direction of the link between two sites, as the movers that send over it see it. Payload bytes."""

    from_site: str
    to_site: str
    used_bytes_per_s: float = 0.0
    capacity_bytes_per_s: float = 0.0
    """What the link carries at most: measured where transfers filled it, else as configured."""
    loss_fraction: float = 0.0
    """Share of segments sent again over the last interval."""
    rtt_s: float = 0.0
    min_rtt_s: float = 0.0
    backlog_bytes: int = 0
    """KVCache that is ready and not yet acknowledged."""
    connections: int = 0
    congested: bool = False
    """The estimator's verdict: delay, loss or backlog say that more would only queue."""
    age_s: float = 0.0

    @property
    def available_bytes_per_s(self) -> float:
        """What is left of the capacity."""
        return max(0.0, self.capacity_bytes_per_s - self.used_bytes_per_s)

    @property
    def queueing_delay_s(self) -> float:
        """Round-trip time over its minimum: what queues on the way add."""
        return max(0.0, self.rtt_s - self.min_rtt_s)


class SiteLoads(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="loads"):
    """One report of an agent. `epoch` changes when the agent restarts, `sequence` grows by one with every report."""

    site: str
    epoch: int
    sequence: int
    servers: list[ServerLoad]
    links: list[LinkLoad] = []
