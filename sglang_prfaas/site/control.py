"""Carries out commands on a site's servers: drain, undrain, another role, limits. One drain or change at a time."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping

from sglang_prfaas.clock import Clock
from sglang_prfaas.config import sglang_args
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.http import Client
from sglang_prfaas.monitor.reports import Action, Drain, SetLimits, SwitchRole, Undrain
from sglang_prfaas.site import health
from sglang_prfaas.site.commands import listening_host
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.load_watch import LoadWatch
from sglang_prfaas.site.role_change import Do, Phase, RoleChange, Seen, Standing, refusal
from sglang_prfaas.site.role_switch import switch_role
from sglang_prfaas.site.server import Server

logger = logging.getLogger(__name__)

_STEP_S = 0.1
_HEALTH_TIMEOUT_S = 10.0


class SiteControl:
    """What was asked of the servers of a site, and how far it is. Belongs to one event loop."""

    def __init__(
        self,
        config: SiteConfig,
        servers: Mapping[str, Server],
        loads: LoadWatch,
        clock: Clock,
        on_change: Callable[[], None],
    ) -> None:
        """on_change: called when what routers should know has changed."""
        self.relayed = dict.fromkeys(servers, 0)
        """Requests under way through the agent, by server."""
        self.results: Counter[tuple[str, str]] = Counter()
        """Ended changes of role, by server and phase."""
        self._config = config
        self._servers = servers
        self._loads = loads
        self._clock = clock
        self._on_change = on_change
        self._changes: dict[str, RoleChange] = {}
        self._limits: dict[str, int] = {}

    # --- what the agent asks ------------------------------------------------------------------------------------------

    def change(self, name: str) -> RoleChange | None:
        """What a server that is not in rotation is going through."""
        return self._changes.get(name)

    def refuses(self, name: str) -> str:
        """Why a new request for a server is not relayed; empty where it is. What a router sent before it knew of a
        drain still is."""
        change = self._changes.get(name)
        if change is not None and not change.accepts:
            return f"Server {name} is {change.text}."
        limit = self._limits.get(name, 0)
        if limit and self.relayed[name] >= limit:
            return f"Server {name} has {limit} requests in work, its limit."
        return ""

    def state(self, name: str) -> str:
        """The state that routers are told: only `ready` means that it takes requests."""
        server, change = self._servers[name], self._changes.get(name)
        if change is None or server.state not in (State.READY, State.UNHEALTHY):
            return str(server.state)
        return "draining" if change.phase in (Phase.DRAINING, Phase.DRAINED) else "switching"

    # --- commands -----------------------------------------------------------------------------------------------------

    async def execute(self, action: Action, deadline_s: float, client: Client) -> tuple[bool, str]:
        """Do it, and wait until it is done: whether it is, and what to tell."""
        if action.server not in self._servers:
            return False, f"no such server: {action.server}; the site has {', '.join(self._servers)}"
        match action:
            case Undrain():
                return self._undrain(action.server)
            case SetLimits():
                if action.max_requests < 0:
                    return False, f"max_requests: expected at least 0, got {action.max_requests}"
                self._limits[action.server] = action.max_requests
                return True, f"at most {action.max_requests or 'any number of'} requests at once"
            case Drain():
                return await self._take_out(action.server, "", deadline_s, client)
            case SwitchRole():
                if self._loads.role(action.server) == action.role and action.server not in self._changes:
                    return True, f"it is {action.role} already"
                return await self._take_out(action.server, action.role, deadline_s, client)

    def _undrain(self, name: str) -> tuple[bool, str]:
        change = self._changes.get(name)
        if change is None:
            return True, "it was not drained"
        if change.phase not in (Phase.DRAINING, Phase.DRAINED):
            return False, f"it is {change.text}; wait for its end"
        change.lost("it was given requests again")
        self._end(change)
        return True, "it takes requests again"

    async def _take_out(self, name: str, role: str, deadline_s: float, client: Client) -> tuple[bool, str]:
        standings = [self._standing(server) for server in self._servers.values()]
        busy = next((n for n, c in self._changes.items() if c.phase is not Phase.DRAINED), "")
        why_not = refusal(standings, name, role, self._config.site.role, self._config.limits, busy)
        if why_not:
            return False, why_not
        old_role = self._loads.role(name)
        change = RoleChange(name, old_role, role, deadline_s, self._config.limits, self._clock)
        self._changes[name] = change
        logger.info("server %s: %s", name, change.text)
        self._on_change()
        try:
            await self._drive(change, client)
        except BaseException:
            change.lost("the agent stopped")
            self._end(change)
            raise
        if change.phase is Phase.DRAINED:
            return True, "it holds no request, and gets none until it is undrained"
        self._end(change)
        done = change.phase is Phase.DONE
        return done, f"it is {role} now" if done else change.reason

    def _standing(self, server: Server) -> Standing:
        available = server.state is State.READY and server.name not in self._changes
        switches = sglang_args.switches_roles(server.command.argv)
        return Standing(server.name, self._loads.role(server.name), available, switches)

    def _end(self, change: RoleChange) -> None:
        if self._changes.get(change.server) is change:
            del self._changes[change.server]
            if change.new_role:
                self.results[change.server, str(change.phase)] += 1
            logger.info("server %s: %s%s", change.server, change.text, f": {change.reason}" if change.reason else "")
            self._on_change()

    # --- one change ---------------------------------------------------------------------------------------------------

    async def _drive(self, change: RoleChange, client: Client) -> None:
        """Step until it has ended, or the server is drained."""
        server = self._servers[change.server]
        started_s, pid, last = self._clock.now_s(), server.pid, change.phase
        while not change.ended and change.phase is not Phase.DRAINED:
            if server.pid != pid and change.phase is not Phase.RESTARTING:
                change.lost("its process ended, and is started again in its configured role")
                break
            do = change.step(await self._see(change, started_s, client))
            while do is not Do.WAIT:
                if do is Do.RESTART:
                    logger.warning("server %s is restarted: %s", server.name, change.reason)
                    server.restart()
                    break
                role = change.new_role if do is Do.SWITCH else change.old_role
                if change.phase is not last:
                    last = change.phase
                    self._on_change()
                do = change.switched(*await switch_role(client, server.url, role, self._config.limits))
            if change.phase is not last:
                last = change.phase
                self._on_change()
            if not change.ended:
                await asyncio.sleep(_STEP_S)

    async def _see(self, change: RoleChange, started_s: float, client: Client) -> Seen:
        name, server = change.server, self._servers[change.server]
        await self._loads.look(client, name)
        load = self._loads.load(name)
        written_after = load is not None and self._clock.now_s() - load.age_s > started_s
        ready = server.state is State.READY
        if change.phase in (Phase.CHECKING, Phase.RESTORING):
            ready = await self._healthy(server)
        return Seen(
            requests=load.requests + bool(load.waiting_uncached_tokens) if load is not None and written_after else None,
            relayed=self.relayed[name],
            role=self._loads.role(name),
            ready=ready,
        )

    async def _healthy(self, server: Server) -> bool:
        host, command = listening_host(server.command.host), server.command
        path, timeout_s = self._config.limits.health_path, _HEALTH_TIMEOUT_S
        if not await health.answers_ok(host, command.port, path, timeout_s):
            return False
        prefill = self._loads.role(server.name) == "prefill"
        return not (prefill and command.bootstrap_port) or await health.listens(host, command.bootstrap_port, timeout_s)
