"""The long timescale, live: once a minute, what the servers report goes into the role policy, and its command out.

The policy is `scheduler.long_term`, the same as in the simulator. What carries a command out is behind `RoleCommander`;
where the loads come from is behind `LoadSource`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.monitor.reports import ServerLoad
from sglang_prfaas.scheduler.long_term import RoleCommand, RoleObservation, RolePolicy, RoleServer
from sglang_prfaas.scheduler.role_capacity import PdLoad
from sglang_prfaas.scheduler.types import ServerRole, SiteView

log = logging.getLogger(__name__)


class RoleResult(Struct, frozen=True):
    """How a role change ended. A server that could not change is back in its old role."""

    succeeded: bool
    detail: str = ""


class RoleCommander(Protocol):
    """Carries role changes out: drain, switch, health check, and back into rotation."""

    async def switch(self, site: str, server: str, role: ServerRole) -> RoleResult:
        """Change one server's role. Raises no error for a change that failed: the result says so."""


class LoadSource(Protocol):
    """The latest reports of a site's servers; what is too old is left out."""

    def loads(self, site: str) -> Sequence[ServerLoad]: ...


class RequestTally:
    """Requests since the last look, and the lengths of the last ones. Fed by whoever routes."""

    def __init__(self, sample: int = 1000) -> None:
        self._lengths: deque[float] = deque(maxlen=sample)
        self._outputs: deque[float] = deque(maxlen=sample)
        self._arrived = 0

    def arrived(self, uncached_tokens: int) -> None:
        """A request was routed."""
        self._arrived += 1
        self._lengths.append(float(uncached_tokens))

    def ended(self, output_tokens: int) -> None:
        """A request was answered to its end."""
        self._outputs.append(float(output_tokens))

    def take(self) -> tuple[int, tuple[float, ...], float]:
        """Requests since the last call, the recent uncached lengths, and the mean output length (0: none known)."""
        arrived, self._arrived = self._arrived, 0
        return arrived, tuple(self._lengths), sum(self._outputs) / max(1, len(self._outputs))


def observe(
    site: SiteView,
    others: Iterable[SiteView],
    loads: Sequence[ServerLoad],
    tally: RequestTally,
    *,
    now_s: float,
    interval_s: float,
    link_gbps: float = 0.0,
) -> RoleObservation | None:
    """What the policy sees of one PD site. None where a server in rotation has no fresh report: nothing is guessed."""
    arrived, lengths, output_tokens = tally.take()
    by_name = {load.server: load for load in loads}
    alive = [server for server in site.servers if server.alive]
    if not alive or any(server.name not in by_name for server in alive):
        return None
    prefill = [by_name[server.name] for server in alive if server.role == "prefill"]
    decode = [by_name[server.name] for server in alive if server.role == "decode"]
    ready_tokens = sum(load.prefill_tokens_per_s for load in prefill) * interval_s
    running = sum(load.running for load in decode)
    load = PdLoad(
        n_p=len(prefill),
        n_d=len(decode),
        arrival_rate=arrived / interval_s,
        prefill_busy=_mean([load.busy_fraction for load in prefill]),
        decode_busy=_mean([_decode_busy(load) for load in decode]),
        prefill_queued=sum(load.waiting_uncached_tokens for load in prefill) / ready_tokens if ready_tokens else 0.0,
        decode_queued=sum(load.waiting + load.prealloc for load in decode) / max(1, running),
        lengths=lengths,
        output_tokens=output_tokens,
        n_prfaas=sum(server.alive for other in others if other.role == "prfaas" for server in other.servers),
        link_gbps=link_gbps,
    )
    servers = [RoleServer(server.name, server.role, server.inflight_requests) for server in alive]
    return RoleObservation(now_s=now_s, site=site.name, servers=servers, load=load)


def _decode_busy(load: ServerLoad) -> float:
    """Decode is full where its pages are; a small batch that always runs is not, however long it computes."""
    return load.kv_tokens_used / load.kv_tokens_total if load.kv_tokens_total else load.busy_fraction


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class RoleLoop:
    """Runs one PD site's role policy until cancelled."""

    def __init__(
        self,
        *,
        site: SiteView,
        others: Sequence[SiteView],
        policy: RolePolicy,
        source: LoadSource,
        commander: RoleCommander,
        tally: RequestTally,
        clock: Clock,
        interval_s: float,
        link_gbps: float = 0.0,
    ) -> None:
        self._site, self._others, self._policy, self._source = site, others, policy, source
        self._commander, self._tally, self._clock = commander, tally, clock
        self._interval_s, self._link_gbps = interval_s, link_gbps

    async def run(self) -> None:
        """Look once every interval; a switch counts into the interval after it."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> RoleCommand | None:
        """One observation and what follows from it. Returns the command that was carried out."""
        seen = observe(
            self._site,
            self._others,
            self._source.loads(self._site.name),
            self._tally,
            now_s=self._clock.now_s(),
            interval_s=self._interval_s,
            link_gbps=self._link_gbps,
        )
        if seen is None:
            log.info("%s: roles stay, no fresh load of every server is known", self._site.name)
            return None
        command = self._policy.decide(seen)
        if command is None:
            log.debug("%s: roles stay: %s", self._site.name, self._policy.reason)
            return None
        log.info("%s: %s is to %s: %s", command.site, command.server, command.role, command.reason)
        result = RoleResult(succeeded=False, detail="cancelled")
        try:
            result = await self._commander.switch(command.site, command.server, command.role)
        finally:
            self._policy.finished(self._clock.now_s(), result.succeeded)
        if not result.succeeded:
            log.warning("%s: %s did not change to %s: %s", command.site, command.server, command.role, result.detail)
        return command
