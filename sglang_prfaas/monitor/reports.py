"""What monitors say: loads of servers and state of links, as plain values that go from movers and agents to routers.

Figures are as measured by whoever sends them, with their age at that moment: clocks of two machines are never compared.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from sglang_prfaas.monitor.cache_reports import CacheUpdate, ReadCache


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
    """Uncached prompt tokens computed for each second in which prefill was busy; the last known where it rests."""
    decode_tokens_per_s: float = 0.0
    """Tokens generated for each second in which decode was busy; the last known where it rests."""
    step_s: float = 0.0
    """Mean time of a decode step; the last known where it rests."""
    busy_fraction: float = 0.0
    """Share of the last interval in which it computed."""
    age_s: float = 0.0
    """How old the figures were when they were sent."""

    @property
    def requests(self) -> int:
        """All requests that it holds, in whatever queue."""
        return self.running + self.waiting + self.prealloc + self.transferring

    @property
    def idle(self) -> bool:
        """Whether it holds no request, not even a part of a prompt between two chunks."""
        return self.requests == 0 and self.waiting_uncached_tokens == 0


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
    filled: bool = False
    """Whether the network was the limit just now: what is used is then all that it carries."""
    congested: bool = False
    """The estimator's verdict: delay, loss or backlog say that more would only queue."""
    congestion: str = ""
    """The strongest of the three, where it is congested."""
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


class ServerState(Struct, frozen=True, kw_only=True):
    """One server as its agent lists it. Only those in state `ready` take new requests.

    path: below the agent's URL. bootstrap_host: empty means the host that the agent is reached at.
    change: what a drain or a change of role is doing; empty in the ordinary course. adapter_ids: SGLang's ids of the
    LoRA adapters that it was started with, by name.
    """

    name: str
    role: str
    state: str
    path: str
    bootstrap_host: str
    bootstrap_port: int
    restarts: int
    change: str = ""
    adapter_ids: dict[str, str] = {}


class ConfiguredLink(Struct, frozen=True, kw_only=True):
    """A link from a site to another as the site's own file has it."""

    to_site: str
    capacity_gbps: float
    rtt_ms: float = 0.0


class SiteState(Struct, frozen=True, kw_only=True, tag="state"):
    """All servers of a site; sent at once when one of them changes. Epoch and sequence as in `SiteLoads`. `GET /site`
    answers the same; name: the site, under the key that routers without reports read."""

    site: str
    name: str
    epoch: int
    sequence: int
    role: str
    model: str
    served_model_name: str
    draining: bool
    servers: list[ServerState]
    links: list[LinkLoad] = []
    configured_links: list[ConfiguredLink] | None = None
    """None: not told, by an agent of an older version."""


class Answer(Struct, frozen=True, kw_only=True, tag="answer"):
    """What became of the command `id`: `done`, or else why not."""

    id: str
    done: bool
    message: str


Report = SiteLoads | SiteState | Answer | CacheUpdate
"""What an agent sends. Another kind is a further struct with a tag of its own here."""


class Subscribe(Struct, frozen=True, kw_only=True, tag="subscribe"):
    """A router asks for reports, again and again: an agent forgets a router that it has not heard for a while.

    router: a name for logs. version: of these messages.
    """

    router: str
    version: int


class Drain(Struct, frozen=True, tag="drain"):
    """Give a server no new requests. Done once it holds none."""

    server: str


class Undrain(Struct, frozen=True, tag="undrain"):
    """Give a drained server requests again."""

    server: str


class SwitchRole(Struct, frozen=True, tag="switch_role"):
    """Drain a server, change its role, check its health, and give it requests again."""

    server: str
    role: Literal["prefill", "decode"]


class SetLimits(Struct, frozen=True, tag="set_limits"):
    """Relay at most `max_requests` at once to a server, 0: any number. Holds until the agent restarts."""

    server: str
    max_requests: int


Action = Drain | Undrain | SwitchRole | SetLimits


class Command(Struct, frozen=True, kw_only=True, tag="command"):
    """An action for a site. The same id again gets the same answer, and nothing is done twice.

    deadline_s: seconds from its arrival within which it must be done; it is undone, and answered, when they are over.
    """

    id: str
    deadline_s: float
    action: Action


Request = Subscribe | Command | ReadCache
"""What a router sends."""

VERSION = 1
