"""What goes wrong in a simulation: links that change, servers that die and come back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from sglang_prfaas.simulate.cluster import Fault
from sglang_prfaas.simulate.servers import DecodeServer, PrefillServer
from sglang_prfaas.simulate.world import PD, PRFAAS

if TYPE_CHECKING:
    from sglang_prfaas.simulate.engine import Simulation


class Faults:
    """Carries out a cluster's faults."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self._world = simulation, simulation.world

    def schedule(self) -> None:
        for fault in self._world.cluster.faults:
            self._world.at(fault.at_s, partial(self._apply, fault))

    def _apply(self, fault: Fault) -> None:
        world, count = self._world, int(fault.value)
        self._simulation.advance_links()
        if fault.kind in ("link_gbps", "link_loss"):
            for link in (world.egress, world.ingress):
                (link.set_capacity if fault.kind == "link_gbps" else link.set_loss)(fault.value, world.now_s)
            return
        action, kind = fault.kind.split("_")
        servers: list[PrefillServer] | list[DecodeServer]
        servers = (
            list(world.decode.values()) if kind == "decode" else world.prefill_of(PRFAAS if kind == "prfaas" else PD)
        )
        if action == "revive":
            for server in [server for server in servers if server.dead][:count]:
                server.view.alive, server.dead = True, False
            self._simulation.dispatch()
            return
        for server in [server for server in servers if not server.dead][:count]:
            if isinstance(server, PrefillServer):
                self._kill_prefill(server)
            else:
                self._kill_decode(server)

    def _kill_prefill(self, server: PrefillServer) -> None:
        """Its requests are prefilled elsewhere: no token was sent yet."""
        for job in server.die():
            self._simulation.retry(job, frozenset({server.view.key}))
        self._simulation.requeue(server.view.site)

    def _kill_decode(self, server: DecodeServer) -> None:
        """Streams that had begun end; KVCache that waited there is lost."""
        running, waiting = server.die(self._world.now_s)
        for job in running:
            job.broken = True
        for job in waiting:
            self._simulation.retry(job, frozenset({server.view.key}))
