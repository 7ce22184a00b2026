"""The discrete-event simulator: production decisions on a virtual clock.

A request is routed when it arrives, may fetch a prefix from the other site, waits for a prefill server, is computed,
moved while it is computed (across the link for PrfaaS; the inner rail of the PD site costs nothing here), waits for a
place in its decode server's batch, and has its first token then. TTFT runs from arrival to that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from sglang_prfaas.core.request import RequestView, Route, ServerKey
from sglang_prfaas.core.units import gbps_to_bytes_per_s
from sglang_prfaas.scheduler import decide
from sglang_prfaas.scheduler.bandwidth import LinkRoom
from sglang_prfaas.scheduler.dispatch import ROUTES, DispatchQueue
from sglang_prfaas.scheduler.long_term import RolePolicy
from sglang_prfaas.scheduler.short_term import uncached_length
from sglang_prfaas.scheduler.threshold import LiveState, PathLoad
from sglang_prfaas.simulate.cluster import Cluster
from sglang_prfaas.simulate.faults import Faults
from sglang_prfaas.simulate.policies import Policy
from sglang_prfaas.simulate.result import Result, Sample
from sglang_prfaas.simulate.role_changes import RoleChanges
from sglang_prfaas.simulate.servers import DecodeServer, Job, PrefillServer
from sglang_prfaas.simulate.workload import Arrival
from sglang_prfaas.simulate.world import PD, PRFAAS, World

SITE_OF: dict[Route, str] = {"local": PD, "prfaas": PRFAAS}
ROUTE_OF: dict[str, Route] = {PD: "local", PRFAAS: "prfaas"}


class Simulation:
    """One run. `run` may be called once."""

    def __init__(
        self,
        cluster: Cluster,
        policy: Policy,
        arrivals: Sequence[Arrival],
        *,
        roles: RolePolicy | None = None,
        sample_s: float = 10.0,
    ) -> None:
        """`roles`: decides role changes, where `cluster.role_changes` allows them."""
        self._cluster, self._policy, self._arrivals, self._sample_s = cluster, policy, arrivals, sample_s
        self.world = World(cluster)
        self._queue: DispatchQueue[int] | None = (
            DispatchQueue(ttft_slo_s=cluster.ttft_slo_s) if cluster.ttft_slo_s else None
        )
        self._room = LinkRoom()
        self._sent: dict[int, Job] = {}
        self._fetching: dict[int, Job] = {}
        self._done = 0
        self._result = Result([Job(number, arrival) for number, arrival in enumerate(arrivals)], [])
        self._faults = Faults(self)
        self.role_changes = RoleChanges(self, roles, cluster.role_changes) if roles and cluster.role_changes else None

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[float], None] | None = None) -> Result:
        """Run until the last request has its first token. `progress` gets the share of requests that arrived."""
        world = self.world
        self._faults.schedule()
        if self.role_changes is not None:
            self.role_changes.schedule()
        if self._arrivals:
            world.at(self._arrivals[0].at_s, partial(self._arrive, 0, progress))
            world.at(0.0, self._take_sample)
        while self._done < len(self._arrivals) and world.step(self.advance_links):
            pass
        if progress is not None:
            progress(1.0)
        self._result.link_bytes = world.egress.sent_bytes
        for server in world.prefill.values():
            self.retired(server)
        if self.role_changes is not None:
            self._result.role_changes = self.role_changes.done
        return self._result

    def advance_links(self) -> None:
        """Bring the links to now; what has arrived goes on."""
        world = self.world
        for link in (world.egress, world.ingress):
            for key in link.advance(world.now_s):
                if key in self._sent:
                    world.at(world.now_s, self.dispatch)
                    world.at(world.now_s + self._cluster.rtt_s / 2, partial(self._kv_complete, self._sent.pop(key)))
                else:
                    world.at(world.now_s + self._cluster.rtt_s / 2, partial(self._fetched, self._fetching.pop(~key)))

    # --- steps of a request -----------------------------------------------------------------------------------------

    def _arrive(self, number: int, progress: Callable[[float], None] | None) -> None:
        if number + 1 < len(self._arrivals):
            self.world.at(self._arrivals[number + 1].at_s, partial(self._arrive, number + 1, progress))
        if progress is not None and number % 256 == 0:
            progress(number / len(self._arrivals))
        self.route(self._result.jobs[number])

    def route(self, job: Job, avoid: frozenset[ServerKey] = frozenset()) -> None:
        """Decide and queue a request, for the first time or again."""
        world, total = self.world, job.arrival.input_tokens
        cached = {site: cache.cached_tokens(job.arrival) for site, cache in world.caches.items()}
        for name, site in world.sites.items():
            site.cached_tokens = cached[name]
        self.advance_links()
        fetch = self._cluster.fetch_prefixes and self._ample()
        world.observation.bandwidth_scarce = not fetch
        usable = dict.fromkeys(cached, max(cached.values())) if fetch else cached
        request = RequestView(l_total=total, avoid=avoid)
        job.uncached_tokens = uncached_length(world.observation, request)
        if self.role_changes is not None and not job.retries:
            self.role_changes.observe(total - usable[PD], job.arrival.output_tokens)
        self._refresh_waits()
        decision = self._policy.decide(self._state(), world.observation, request)
        if decision.prefill is None or decision.decode is None:
            job.failed = True
            self._done += 1
            return
        job.route, job.t_tokens = decision.prefill.site, decision.t_tokens
        job.compute_tokens = total - usable[job.route]
        job.move_bytes = self._cluster.fleet.kv.increment_bytes(total, cached[PD])
        job.fetch_bytes = 0.0
        if usable[job.route] > cached[job.route]:
            self._fetch(job, usable[job.route] - cached[job.route])
        else:
            self._enqueue(job)

    def _ample(self) -> bool:
        link = self.world.egress
        return self._room.ample(
            self.world.now_s,
            capacity_bytes_per_s=gbps_to_bytes_per_s(link.gbps),
            sent_bytes=link.sent_bytes,
            backlog_bytes=link.backlog_bytes(),
        )

    def _refresh_waits(self) -> None:
        for server in self.world.prefill.values():
            server.view.wait_s = server.wait_s(self.world.now_s)

    def _fetch(self, job: Job, tokens: int) -> None:
        """The other site's cache sends blocks and the state at their end."""
        world, kv = self.world, self._cluster.fleet.kv
        job.fetch_bytes = tokens * kv.full_bytes_per_token + kv.state_bytes
        link = world.ingress if job.route == PRFAAS else world.egress
        link.start(~job.number, job.fetch_bytes, 0.0, 1e-3, world.now_s)
        self._fetching[job.number] = job

    def _fetched(self, job: Job) -> None:
        self.world.caches[job.route].insert(job.arrival)
        self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        if self._queue is None:
            if not self._send_to_server(job):
                self.route(job)
            return
        fleet, tokens = self._cluster.fleet, float(job.compute_tokens)
        local_s = fleet.pd_prefill.time_s.at(tokens)
        far_s = float("inf")
        if fleet.prfaas_prefill is not None and self.world.egress.gbps > 0:
            bytes_per_s = gbps_to_bytes_per_s(self.world.egress.gbps)
            sending_s = (job.move_bytes - fleet.kv.state_bytes) / bytes_per_s
            far_s = max(fleet.prfaas_prefill.time_s.at(tokens), sending_s) + fleet.kv.state_bytes / bytes_per_s
        self._queue.add(
            job.number,
            ROUTE_OF[job.route],
            arrived_s=job.arrival.at_s,
            local_s=local_s,
            prfaas_s=far_s,
            link_bytes=job.move_bytes,
        )
        self.dispatch()

    def dispatch(self) -> None:
        """Servers with room take requests from the queue."""
        if self._queue is None:
            return
        now_s, lead_s = self.world.now_s, self._cluster.dispatch_lead_s
        for route in ROUTES:
            other: Route = "local" if route == "prfaas" else "prfaas"
            while self._queue.waiting(route) + self._queue.waiting(other):
                left_s = self._left_s(SITE_OF[route])
                if min(left_s, default=float("inf")) > lead_s:
                    break
                link = self.world.egress
                link_s = link.outstanding_bytes() / max(1.0, gbps_to_bytes_per_s(link.gbps))
                number = self._queue.take(route, now_s, left_s, self._left_s(SITE_OF[other]), link_s)
                if number is None:
                    break
                job = self._result.jobs[number]
                job.route = SITE_OF[route]
                if not self._send_to_server(job, route):
                    self.route(job)

    def requeue(self, site: str) -> None:
        """A site has no prefill server left: decide again about everything that waits for it."""
        if self._queue is not None and not self._left_s(site):
            for number in self._queue.keys(ROUTE_OF[site]):
                self._queue.remove(number)
                self.route(self._result.jobs[number])

    def _left_s(self, site: str) -> list[float]:
        """Seconds of work of each usable prefill server of a site."""
        now_s = self.world.now_s
        return [server.wait_s(now_s) for server in self.world.prefill_of(site) if server.view.alive]

    def _send_to_server(self, job: Job, route: Route | None = None) -> bool:
        """Bind a request to a prefill and a decode server. False where its route has none any more."""
        self._refresh_waits()
        forced = route or ROUTE_OF[job.route]
        decision = decide(self.world.observation, RequestView(l_total=job.arrival.input_tokens, forced=forced))
        if decision.prefill is None or decision.decode is None:
            return False
        if not job.decode:
            job.decode = decision.decode.name
            self.world.decode[decision.decode.key].expect()
        server = self.world.prefill[decision.prefill.key]
        job.start_from_s = self.world.now_s + (self._cluster.rtt_s / 2 if job.route == PRFAAS else 0.0)
        server.push(job)
        self._start_next(server)
        return True

    def _start_next(self, server: PrefillServer) -> None:
        if server.current is not None or not server.queue:
            return
        world, now_s = self.world, self.world.now_s
        if (ready_s := server.queue[0].start_from_s) > now_s:
            world.at(ready_s, partial(self._start_next, server))
            return
        job = server.start(now_s)
        if job.route == PRFAAS:
            state_bytes = self._cluster.fleet.kv.state_bytes
            self.advance_links()
            world.egress.start(job.number, job.move_bytes, state_bytes, job.work_s, now_s)
            self._sent[job.number] = job
        self._expect_end(server)

    def _expect_end(self, server: PrefillServer) -> None:
        world, end_s = self.world, server.end_s()
        world.at(end_s, partial(self._prefill_done, server, server.epoch))
        if self._queue is not None and (lead_s := end_s - self._cluster.dispatch_lead_s) > world.now_s:
            world.at(lead_s + 1e-9, self.dispatch)

    def _prefill_done(self, server: PrefillServer, epoch: int) -> None:
        if epoch != server.epoch:
            return
        job = server.finish(self.world.now_s)
        self._policy.learn(self.world.now_s, job.route, job.compute_tokens, job.work_s)
        self.world.caches[job.route].insert(job.arrival)
        if job.route == PD:
            self._kv_complete(job)
        else:
            self.advance_links()
        self._start_next(server)
        self.dispatch()

    def _kv_complete(self, job: Job) -> None:
        server = self.world.decode.get((PD, job.decode))
        if server is None or server.dead:
            self.retry(job, frozenset())
            return
        job.arrived_s = self.world.now_s
        self.world.caches[PD].insert(job.arrival)  # decode's cache is the PD site's
        if server.free:
            self._start_decode(server, job)
        else:
            server.waiting.append(job)

    def _start_decode(self, server: DecodeServer, job: Job) -> None:
        now_s = self.world.now_s
        server.start(job, now_s)
        job.first_token_s = now_s
        self._done += 1
        self._batch_changed(server)

    def _decode_done(self, server: DecodeServer, epoch: int) -> None:
        if epoch != server.epoch:
            return
        server.finish(self.world.now_s)
        server.leave()
        if server.waiting:
            self._start_decode(server, server.waiting.popleft())
        else:
            self._batch_changed(server)

    def _batch_changed(self, server: DecodeServer) -> None:
        """The next one is done at another time; prefill on the same instance slows down or speeds up."""
        world = self.world
        if server.running:
            world.at(server.next_end_s(), partial(self._decode_done, server, server.epoch))
        if (both := server.shares) is not None:
            both.set_speed(server.prefill_share, world.now_s)
            if both.current is not None:
                self._expect_end(both)

    def retry(self, job: Job, avoid: frozenset[ServerKey]) -> None:
        """No token was sent yet: its KVCache is gone, so it is prefilled again."""
        self.advance_links()
        self.world.egress.drop(job.number, self.world.now_s)
        self._sent.pop(job.number, None)
        server = self.world.decode.get((PD, job.decode))
        if server is not None and server.dead:
            server.leave()
        if server is None or server.dead:
            job.decode = ""
        job.retries += 1
        self.route(job, avoid)

    # --- state ------------------------------------------------------------------------------------------------------

    def _state(self) -> LiveState:
        now_s = self.world.now_s
        if not self._policy.live:
            idle = PathLoad(servers=0, wait_s=0)
            return LiveState(now_s=now_s, prfaas=idle, local=idle, link_gbps=0)
        return LiveState(
            now_s=now_s,
            prfaas=self._load("prfaas"),
            local=self._load("local"),
            link_gbps=self.world.egress.gbps,
            link_backlog_bytes=self.world.egress.backlog_bytes(),
        )

    def _load(self, route: Route) -> PathLoad:
        now_s = self.world.now_s
        alive = [server for server in self.world.prefill_of(SITE_OF[route]) if server.view.alive]
        servers = sum(server.speed for server in alive)
        wait_s = min((server.wait_s(now_s) for server in alive), default=float("inf"))
        if self._queue is not None and servers:
            ahead, bytes_per_s = self._queue.ahead(route, now_s), gbps_to_bytes_per_s(self.world.egress.gbps)
            wait_s += max(ahead.work_s / servers, ahead.link_bytes / max(1.0, bytes_per_s))
        return PathLoad(servers=servers, wait_s=wait_s)

    def queued(self, site: str) -> int:
        """Requests that wait for prefill in a site, in front of its servers or at them."""
        at_servers = sum(len(server.queue) for server in self.world.prefill_of(site))
        return at_servers + (self._queue.waiting(ROUTE_OF[site]) if self._queue is not None else 0)

    def queued_s(self, site: str) -> float:
        """Seconds of prefill that wait in a site, on one server."""
        at_servers = sum(server.waiting_s for server in self.world.prefill_of(site))
        if self._queue is None:
            return at_servers
        return at_servers + self._queue.work_s(ROUTE_OF[site])

    def retired(self, server: PrefillServer) -> None:
        """A prefill server leaves its role: keep what it did."""
        name = f"{server.view.site}/{server.view.name}"
        self._result.busy_s[name] = self._result.busy_s.get(name, 0.0) + server.busy_s

    def _take_sample(self) -> None:
        world = self.world
        self.advance_links()
        self._result.samples.append(
            Sample(
                at_s=world.now_s,
                t_tokens=world.observation.t_tokens,
                prfaas_queue=self.queued(PRFAAS),
                local_queue=self.queued(PD),
                decode_waiting=sum(len(server.waiting) for server in world.decode.values()),
                decode_running=sum(server.running for server in world.decode.values()),
                prfaas_alive=sum(server.view.alive for server in world.prefill_of(PRFAAS)),
                prefill_servers=sum(server.view.alive for server in world.prefill_of(PD)),
                decode_servers=sum(server.view.alive for server in world.decode.values()),
                link_gbps=world.egress.gbps,
                sent_bytes=world.egress.sent_bytes,
            )
        )
        if self._done < len(self._arrivals):
            world.at(world.now_s + self._sample_s, self._take_sample)
