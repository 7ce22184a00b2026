"""The discrete-event simulator: production decisions on a virtual clock.

A request is routed when it arrives, waits for its prefill server, is computed, moved while it is computed (across the
link for PrfaaS; the inner rail of the PD site costs nothing here), waits for a place in its decode server's batch, and
has its first token then. TTFT runs from arrival to that.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from functools import partial

from sglang_prfaas.clock import VirtualClock
from sglang_prfaas.core.request import RequestView, ServerKey
from sglang_prfaas.scheduler import Observation, ServerView, SiteView
from sglang_prfaas.scheduler.short_term import uncached_length
from sglang_prfaas.scheduler.threshold import LiveState, PathLoad
from sglang_prfaas.simulate.cluster import Cluster, Fault
from sglang_prfaas.simulate.link import SharedLink
from sglang_prfaas.simulate.policies import Policy
from sglang_prfaas.simulate.result import Result, Sample
from sglang_prfaas.simulate.servers import DecodeServer, Job, PrefillServer, PrefixCache
from sglang_prfaas.simulate.workload import Arrival

PRFAAS, PD = "prfaas", "pd"


class Simulation:
    """One run. `run` may be called once."""

    def __init__(
        self, cluster: Cluster, policy: Policy, arrivals: Sequence[Arrival], *, sample_s: float = 10.0
    ) -> None:
        cluster.check()
        self._cluster, self._policy, self._arrivals, self._sample_s = cluster, policy, arrivals, sample_s
        self._clock = VirtualClock()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._counter = 0
        self._link = SharedLink(cluster.fleet.egress_gbps)
        self._link_event_s = float("inf")
        self._prefill: dict[ServerKey, PrefillServer] = {}
        self._decode: dict[ServerKey, DecodeServer] = {}
        self._caches = {PRFAAS: PrefixCache(cluster.cache_blocks), PD: PrefixCache(cluster.cache_blocks)}
        self._sites = {PRFAAS: SiteView(PRFAAS, "prfaas", []), PD: SiteView(PD, "pd", [])}
        self._build()
        self._paths = {
            name: [server for key, server in self._prefill.items() if key[0] == name] for name in (PRFAAS, PD)
        }
        self._observation = Observation(list(self._sites.values()), 0)
        self._sent: dict[int, Job] = {}
        self._done = 0
        self._result = Result([Job(number, arrival) for number, arrival in enumerate(arrivals)], [])

    def _build(self) -> None:
        fleet, shared, slack = self._cluster.fleet, self._cluster.shared, self._cluster.order_slack
        slots = fleet.pd_decode.batch_max(self._cluster.slo_tokens_per_s)
        for index in range(fleet.n_prfaas):
            assert fleet.prfaas_prefill is not None
            view = self._view(PRFAAS, f"prefill-{index}", "prefill")
            self._prefill[view.key] = PrefillServer(view, fleet.prfaas_prefill, slack)
        for index in range(int(self._cluster.n_p)):
            view = self._view(PD, f"prefill-{index}", "prefill")
            self._prefill[view.key] = PrefillServer(view, fleet.pd_prefill, slack)
        for index in range(self._cluster.whole_decode):
            view = self._view(PD, f"decode-{index}", "decode")
            self._decode[view.key] = DecodeServer(view, slots, slots)
        if shared:
            view = self._view(PD, "shared-prefill", "prefill")
            both = self._prefill[view.key] = PrefillServer(view, fleet.pd_prefill, slack)
            if places := int(slots * (1 - shared) + 1e-9):
                view = self._view(PD, "shared-decode", "decode")
                self._decode[view.key] = DecodeServer(view, places, slots, both)
        self._step_s = fleet.pd_decode.step_s.at(slots)

    def _view(self, site: str, name: str, role: str) -> ServerView:
        view = ServerView(site, name, "prefill" if role == "prefill" else "decode", alive=True)
        self._sites[site].servers.append(view)
        return view

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[float], None] | None = None) -> Result:
        """Run until the last request has its first token. `progress` gets the share of requests that arrived."""
        for fault in self._cluster.faults:
            self._at(fault.at_s, partial(self._fault, fault))
        if self._arrivals:
            self._at(self._arrivals[0].at_s, partial(self._arrive, 0, progress))
            self._at(0.0, self._take_sample)
        while self._events and self._done < len(self._arrivals):
            if self._link_event_s <= self._events[0][0]:
                self._move_to(self._link_event_s)
                self._advance_link()
                continue
            at_s, _, action = heapq.heappop(self._events)
            self._move_to(at_s)
            action()
        self._result.link_bytes = self._link.sent_bytes
        self._result.busy_s = {f"{site}/{name}": server.busy_s for (site, name), server in self._prefill.items()}
        return self._result

    def _at(self, at_s: float, action: Callable[[], None]) -> None:
        self._counter += 1
        heapq.heappush(self._events, (at_s, self._counter, action))

    def _move_to(self, at_s: float) -> None:
        self._clock.advance(max(0.0, at_s - self._clock.now_s()))

    def _advance_link(self) -> None:
        """Bring the link to now; what has arrived goes to decode."""
        now_s = self._clock.now_s()
        for key in self._link.advance(now_s):
            self._at(now_s + self._cluster.rtt_s / 2, partial(self._kv_complete, self._sent.pop(key)))
        self._link_event_s = self._link.next_event_s()

    # --- steps of a request -----------------------------------------------------------------------------------------

    def _arrive(self, number: int, progress: Callable[[float], None] | None) -> None:
        if number + 1 < len(self._arrivals):
            self._at(self._arrivals[number + 1].at_s, partial(self._arrive, number + 1, progress))
        if progress is not None and number % 256 == 0:
            progress(number / len(self._arrivals))
        job = self._result.jobs[number]
        self._route(job, frozenset())

    def _route(self, job: Job, avoid: frozenset[ServerKey]) -> None:
        cached = {name: cache.cached_tokens(job.arrival) for name, cache in self._caches.items()}
        for name, site in self._sites.items():
            site.cached_tokens = cached[name]
        request = RequestView(l_total=job.arrival.input_tokens, avoid=avoid)
        job.uncached_tokens = uncached_length(self._observation, request)
        now_s = self._clock.now_s()
        for server in self._prefill.values():
            server.view.wait_s = server.wait_s(now_s)
        decision = self._policy.decide(self._state(), self._observation, request)
        if decision.prefill is None or decision.decode is None:
            job.failed = True
            self._done += 1
            return
        job.route, job.t_tokens = decision.prefill.site, decision.t_tokens
        if not job.decode:
            job.decode = decision.decode.name
            self._decode[decision.decode.key].expect()
        job.compute_tokens = job.arrival.input_tokens - cached[job.route]
        job.move_bytes = self._cluster.fleet.kv.increment_bytes(job.arrival.input_tokens, cached[PD])
        server = self._prefill[decision.prefill.key]
        server.push(job)
        self._start_next(server)

    def _start_next(self, server: PrefillServer) -> None:
        if server.current is not None or not server.queue:
            return
        now_s = self._clock.now_s()
        job = server.start(now_s)
        if job.route == PRFAAS:
            self._advance_link()
            state_bytes = self._cluster.fleet.kv.state_bytes
            self._link.start(job.number, job.move_bytes, state_bytes, job.work_s, now_s)
            self._sent[job.number] = job
            self._link_event_s = self._link.next_event_s()
        self._at(server.end_s(), partial(self._prefill_done, server, server.epoch))

    def _prefill_done(self, server: PrefillServer, epoch: int) -> None:
        if epoch != server.epoch:
            return
        job = server.finish(self._clock.now_s())
        self._policy.learn(self._clock.now_s(), job.route, job.compute_tokens, job.work_s)
        self._caches[job.route].insert(job.arrival)
        if job.route == PD:
            self._kv_complete(job)
        else:
            self._advance_link()
        self._start_next(server)

    def _kv_complete(self, job: Job) -> None:
        job.arrived_s = self._clock.now_s()
        self._caches[PD].insert(job.arrival)  # decode's cache is the PD site's
        server = self._decode[(PD, job.decode)]
        if server.free:
            self._start_decode(server, job)
        else:
            server.waiting.append(job)

    def _start_decode(self, server: DecodeServer, job: Job) -> None:
        self._take(server, -1)
        job.first_token_s = self._clock.now_s()
        self._done += 1
        self._at(job.first_token_s + job.arrival.output_tokens * self._step_s, partial(self._decode_done, server))

    def _decode_done(self, server: DecodeServer) -> None:
        server.leave()
        self._take(server, 1)
        if server.waiting:
            self._start_decode(server, server.waiting.popleft())

    def _take(self, server: DecodeServer, change: int) -> None:
        """A place is taken or given back; prefill on the same instance slows down or speeds up."""
        server.free += change
        if (both := server.shares) is not None:
            both.set_speed(server.prefill_share, self._clock.now_s())
            if both.current is not None:
                self._at(both.end_s(), partial(self._prefill_done, both, both.epoch))

    # --- state and faults -------------------------------------------------------------------------------------------

    def _state(self) -> LiveState:
        now_s = self._clock.now_s()
        if not self._policy.live:
            idle = PathLoad(servers=0, wait_s=0)
            return LiveState(now_s=now_s, prfaas=idle, local=idle, link_gbps=0)
        if self._cluster.fleet.n_prfaas:
            self._advance_link()
        return LiveState(
            now_s=now_s,
            prfaas=self._load(PRFAAS, now_s),
            local=self._load(PD, now_s),
            link_gbps=self._link.gbps,
            link_backlog_bytes=self._link.backlog_bytes(),
        )

    def _load(self, path: str, now_s: float) -> PathLoad:
        alive = [server for server in self._paths[path] if server.view.alive]
        return PathLoad(
            servers=sum(server.speed for server in alive),
            wait_s=min((server.wait_s(now_s) for server in alive), default=float("inf")),
        )

    def _fault(self, fault: Fault) -> None:
        self._advance_link()
        if fault.kind == "link_gbps":
            self._link.set_capacity(fault.value, self._clock.now_s())
        elif fault.kind == "kill_prfaas":
            for server in [server for server in self._paths[PRFAAS] if server.view.alive][: int(fault.value)]:
                self._kill(server)
        else:
            for server in [server for server in self._paths[PRFAAS] if not server.view.alive][: int(fault.value)]:
                server.view.alive = True
        self._link_event_s = self._link.next_event_s()

    def _kill(self, server: PrefillServer) -> None:
        """Its requests are prefilled elsewhere: no token was sent yet."""
        for job in server.die():
            self._link.drop(job.number, self._clock.now_s())
            self._sent.pop(job.number, None)
            job.retries += 1
            self._route(job, frozenset({server.view.key}))

    def _take_sample(self) -> None:
        now_s = self._clock.now_s()
        if self._cluster.fleet.n_prfaas:
            self._advance_link()
        queues = {path: sum(len(server.queue) for server in self._paths[path]) for path in (PRFAAS, PD)}
        self._result.samples.append(
            Sample(
                at_s=now_s,
                t_tokens=self._observation.t_tokens,
                prfaas_queue=queues[PRFAAS],
                local_queue=queues[PD],
                decode_waiting=sum(len(server.waiting) for server in self._decode.values()),
                decode_running=sum(server.slots - server.free for server in self._decode.values()),
                prfaas_alive=sum(server.view.alive for server in self._paths[PRFAAS]),
                link_gbps=self._link.gbps,
                sent_bytes=self._link.sent_bytes,
            )
        )
        if self._done < len(self._arrivals):
            self._at(now_s + self._sample_s, self._take_sample)
