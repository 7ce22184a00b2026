"""The long timescale, live: every interval, what the servers report goes into the role policy, and its command out.

The policy is `scheduler.long_term`, the same as in the simulator. What carries a command out is behind `RoleCommander`;
where loads come from is behind `LoadSource`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec
from msgspec import Struct

from sglang_prfaas.clock import Clock
from sglang_prfaas.monitor.load_source import LoadSource
from sglang_prfaas.monitor.reports import ServerLoad
from sglang_prfaas.scheduler.long_term import RoleCommand, RoleObservation, RolePolicy, RoleServer
from sglang_prfaas.scheduler.role_capacity import PdLoad
from sglang_prfaas.scheduler.types import ServerRole, SiteView

log = logging.getLogger(__name__)

_SAMPLES = 12
"""Looks at the reports in each interval: a report covers the last second or so."""
_KEPT = 32


class RoleResult(Struct, frozen=True):
    """How a role change ended. A server that could not change is back in its old role."""

    succeeded: bool
    detail: str = ""


class RoleCommander(Protocol):
    """Carries role changes out: drain, switch, health check, and back into rotation."""

    async def switch(self, site: str, server: str, role: ServerRole) -> RoleResult:
        """Change one server's role. Raises no error for a change that failed: the result says so."""


class RequestTally:
    """Requests since the last look, and the lengths of the last ones. Fed by whoever routes."""

    def __init__(self, sample: int = 1000) -> None:
        self._lengths: deque[float] = deque(maxlen=sample)
        self._arrived = 0

    def arrived(self, uncached_tokens: int) -> None:
        """A request was routed."""
        self._arrived += 1
        self._lengths.append(float(uncached_tokens))

    def take(self) -> tuple[int, tuple[float, ...]]:
        """Requests since the last call, and the recent uncached lengths."""
        arrived, self._arrived = self._arrived, 0
        return arrived, tuple(self._lengths)


class LoadMeans:
    """Means of the reports over an interval, of every server in the role that it has now."""

    def __init__(self) -> None:
        self._seen: dict[str, list[ServerLoad]] = {}

    def add(self, load: ServerLoad) -> None:
        seen = self._seen.setdefault(load.server, [])
        if seen and seen[-1].role != load.role:
            seen.clear()
        seen.append(load)

    def take(self) -> list[ServerLoad]:
        """The means since the last call; queues are rounded to whole requests and tokens."""
        taken, self._seen = self._seen, {}
        return [_mean_load(loads) for loads in taken.values()]


class RoleDecision(Struct, frozen=True, kw_only=True):
    """One look: what was seen, what followed, and why. `command` and `result` are empty where roles stayed."""

    at_s: float
    reason: str
    load: PdLoad | None = None
    command: RoleCommand | None = None
    result: RoleResult | None = None


def observe(
    site: SiteView,
    others: Iterable[SiteView],
    loads: Sequence[ServerLoad],
    tally: RequestTally,
    *,
    now_s: float,
    interval_s: float,
    link_gbps: float = 0.0,
    held_s: float = 0.0,
) -> RoleObservation | None:
    """What the policy sees of one PD site. None where a server in rotation has no fresh report: nothing is guessed.

    held_s: seconds of local prefill, on one server, that wait in the router. Output lengths follow from what decode
    servers generated."""
    arrived, lengths = tally.take()
    by_name = {load.server: load for load in loads}
    alive = [server for server in site.servers if server.alive]
    if not alive or any(server.name not in by_name for server in alive):
        return None
    prefill = [by_name[server.name] for server in alive if server.role == "prefill"]
    decode = [by_name[server.name] for server in alive if server.role == "decode"]
    ready_tokens = sum(load.prefill_tokens_per_s for load in prefill) * interval_s
    queued = sum(load.waiting_uncached_tokens for load in prefill) / ready_tokens if ready_tokens else 0.0
    running = sum(load.running for load in decode)
    generated = sum(load.decode_tokens_per_s * load.busy_fraction for load in decode) * interval_s
    load = PdLoad(
        n_p=len(prefill),
        n_d=len(decode),
        arrival_rate=arrived / interval_s,
        prefill_busy=_mean([load.busy_fraction for load in prefill]),
        decode_busy=_mean([_decode_busy(load) for load in decode]),
        prefill_queued=queued + held_s / interval_s / max(1, len(prefill)),
        decode_queued=sum(load.waiting + load.prealloc for load in decode) / max(1, running),
        lengths=lengths,
        output_tokens=generated / max(1, arrived),
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


def _mean_load(loads: list[ServerLoad]) -> ServerLoad:
    def mean(field: str) -> float:
        return _mean([float(getattr(load, field)) for load in loads])

    whole = ("running", "waiting", "prealloc", "transferring", "waiting_uncached_tokens", "kv_tokens_used")
    means = {field: round(mean(field)) for field in whole}
    return msgspec.structs.replace(loads[-1], busy_fraction=mean("busy_fraction"), **means)


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
        clock: Clock,
        interval_s: float,
        link_gbps: Callable[[], float] = lambda: 0.0,
        held_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """link_gbps: capacity of the links to this site. held_s: as for `observe`."""
        self.tally = RequestTally()
        self.decisions: deque[RoleDecision] = deque(maxlen=_KEPT)
        """The last looks, newest last."""
        self.changes: dict[tuple[str, str, str], int] = {}
        """Role changes so far by site, new role, and whether they succeeded ("done" or "failed")."""
        self._site, self._others, self._policy, self._source = site, others, policy, source
        self._commander, self._clock, self._means = commander, clock, LoadMeans()
        self._interval_s, self._link_gbps, self._held_s = interval_s, link_gbps, held_s

    @property
    def site(self) -> str:
        return self._site.name

    async def run(self) -> None:
        """Look once every interval; a switch counts into the interval after it."""
        while True:
            for _ in range(_SAMPLES):
                await asyncio.sleep(self._interval_s / _SAMPLES)
                self._sample()
            await self.look()

    def _sample(self) -> list[str]:
        """Take the reports of now; returns the servers in rotation without a fresh one."""
        missing = []
        for server in self._site.servers:
            load = self._source.server(self._site.name, server.name)
            if load is not None and load.role in ("", server.role):
                self._means.add(load)
            elif server.alive:
                missing.append(server.name)
        return missing

    async def look(self) -> RoleCommand | None:
        """One observation and what follows from it. Returns the command that was carried out."""
        missing = self._sample()
        now_s = self._clock.now_s()
        seen = observe(
            self._site,
            self._others,
            [load for load in self._means.take() if load.server not in missing],
            self.tally,
            now_s=now_s,
            interval_s=self._interval_s,
            link_gbps=self._link_gbps(),
            held_s=self._held_s(),
        )
        if seen is None:
            why = f"no fresh load of {', '.join(missing)}" if missing else "no server is alive"
            self.decisions.append(RoleDecision(at_s=now_s, reason=why))
            log.info("%s: roles stay: %s", self._site.name, why)
            return None
        command = self._policy.decide(seen)
        load = msgspec.structs.replace(seen.load, lengths=())
        if command is None:
            self.decisions.append(RoleDecision(at_s=now_s, reason=self._policy.reason, load=load))
            log.debug("%s: roles stay: %s", self._site.name, self._policy.reason)
            return None
        log.info("%s: %s is to %s: %s", command.site, command.server, command.role, command.reason)
        result = RoleResult(succeeded=False, detail="cancelled")
        try:
            result = await self._commander.switch(command.site, command.server, command.role)
        finally:
            self._policy.finished(self._clock.now_s(), result.succeeded)
            self.decisions.append(
                RoleDecision(at_s=now_s, reason=command.reason, load=load, command=command, result=result)
            )
            key = (command.site, command.role, "done" if result.succeeded else "failed")
            self.changes[key] = self.changes.get(key, 0) + 1
        if not result.succeeded:
            log.warning("%s: %s did not change to %s: %s", command.site, command.server, command.role, result.detail)
        return command
