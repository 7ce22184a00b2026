"""Role changes during a simulation: the production policy decides, and the server drains, switches and serves again."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING

from sglang_prfaas.scheduler.long_term import RoleCommand, RoleObservation, RolePolicy, RoleServer
from sglang_prfaas.scheduler.role_capacity import PdLoad
from sglang_prfaas.scheduler.types import ServerRole
from sglang_prfaas.simulate.cluster import RoleChangeCost
from sglang_prfaas.simulate.result import RoleChange
from sglang_prfaas.simulate.servers import DecodeServer, PrefillServer
from sglang_prfaas.simulate.world import PD, PRFAAS

if TYPE_CHECKING:
    from sglang_prfaas.simulate.engine import Simulation

INTERVAL_S = 60.0
SAMPLE = 1000
DRAIN_POLL_S = 0.5


class RoleChanges:
    """Observes once a minute, and carries out what the policy says."""

    def __init__(self, simulation: Simulation, policy: RolePolicy, cost: RoleChangeCost) -> None:
        self._simulation, self._world, self._policy, self._cost = simulation, simulation.world, policy, cost
        self._lengths: deque[float] = deque(maxlen=SAMPLE)
        self._outputs: deque[float] = deque(maxlen=SAMPLE)
        self._arrived = self._attempts = 0
        self._seen_busy_s: dict[str, float] = {}
        self.done: list[RoleChange] = []

    def schedule(self) -> None:
        self._world.at(self._world.now_s + INTERVAL_S, self._look)

    def observe(self, local_tokens: int, output_tokens: int) -> None:
        """A request came in."""
        self._arrived += 1
        self._lengths.append(float(local_tokens))
        self._outputs.append(float(output_tokens))

    def _look(self) -> None:
        command = self._policy.decide(self._observation())
        if command is not None:
            self._begin(command)
        self.schedule()

    def _observation(self) -> RoleObservation:
        world, now_s = self._world, self._world.now_s
        prefill = [server for server in world.prefill_of(PD) if server.view.alive]
        decode = [server for server in world.decode.values() if server.view.alive]
        for server in decode:
            server.advance(now_s)
        busy_p = sum(self._since(f"p {each.view.name}", each.busy_until(now_s)) for each in prefill)
        busy_d = sum(self._since(f"d {each.view.name}", each.batch_s) for each in decode)
        places = sum(server.slots for server in decode)
        arrived, self._arrived = self._arrived, 0
        load = PdLoad(
            n_p=len(prefill),
            n_d=len(decode),
            arrival_rate=arrived / INTERVAL_S,
            prefill_busy=min(1.0, busy_p / INTERVAL_S / max(1, len(prefill))),
            decode_busy=min(1.0, busy_d / INTERVAL_S / max(1, places)),
            prefill_queued=self._simulation.queued_s(PD) / INTERVAL_S / max(1, len(prefill)),
            decode_queued=sum(len(server.waiting) for server in decode) / max(1, places),
            lengths=tuple(self._lengths),
            output_tokens=sum(self._outputs) / max(1, len(self._outputs)),
            n_prfaas=sum(server.view.alive for server in world.prefill_of(PRFAAS)),
            link_gbps=world.egress.gbps,
        )
        views = [*(server.view for server in prefill), *(server.view for server in decode)]
        servers = [RoleServer(view.name, view.role, view.inflight_requests) for view in views]
        return RoleObservation(now_s=now_s, site=PD, servers=servers, load=load)

    def _since(self, name: str, total: float) -> float:
        """What was added since the last look."""
        before, self._seen_busy_s[name] = self._seen_busy_s.get(name, total), total
        return total - before

    def _begin(self, command: RoleCommand) -> None:
        """Out of rotation, so that it gets no new work."""
        server = self._server(command.server)
        server.view.alive = False
        self._attempts += 1
        self._drain(command, self._world.now_s, self._attempts <= self._cost.fails)

    def _server(self, name: str) -> PrefillServer | DecodeServer:
        return self._world.prefill.get((PD, name)) or self._world.decode[(PD, name)]

    def _drain(self, command: RoleCommand, began_s: float, fails: bool) -> None:
        world, server = self._world, self._server(command.server)
        if server.dead:
            self._finish(command, began_s, None)
        elif server.idle:
            old = server.view.role
            world.remove(server.view)
            if isinstance(server, PrefillServer):
                self._simulation.retired(server)
            role = old if fails else command.role
            world.at(world.now_s + self._cost.switch_s, partial(self._finish, command, began_s, role))
        elif world.now_s - began_s > self._cost.drain_timeout_s:
            server.view.alive = True
            self._finish(command, began_s, None)
        else:
            world.at(world.now_s + DRAIN_POLL_S, partial(self._drain, command, began_s, fails))

    def _finish(self, command: RoleCommand, began_s: float, role: ServerRole | None) -> None:
        """Back in rotation in `role`; None: it never left its old one."""
        if role == "prefill":
            self._world.add_prefill(PD, command.server)
        elif role == "decode":
            self._world.add_decode(command.server)
        succeeded = role == command.role
        self._policy.finished(self._world.now_s, succeeded)
        self.done.append(
            RoleChange(
                at_s=began_s,
                done_s=self._world.now_s,
                server=command.server,
                role=command.role,
                succeeded=succeeded,
                reason=command.reason,
            )
        )
        self._simulation.dispatch()
