"""Taking a server out of rotation, and changing its role: a pure state machine, what is seen in, what to do out.

    draining ──no requests──▶ switching ──accepted──▶ checking ──healthy in the new role──▶ done
        │                         │                       │
        │ deadline                │ refused, unharmed     │ not healthy in time
        ▼                         ▼                       ▼
     failed ◀─────────────────────┘       restoring (switch back) ──healthy in the old role──▶ failed
                                                          │ refused, or not healthy in time
                                  switching: broken ──▶ restarting (the process, in its configured role) ──▶ failed

A plain drain ends in `drained`, and stays there until it is undone.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from msgspec import Struct

from sglang_prfaas.clock import Clock, Deadline
from sglang_prfaas.config.schema import SiteLimits


class Phase(StrEnum):
    """Where a drain or a change of role is."""

    DRAINING = "draining"
    DRAINED = "drained"
    SWITCHING = "switching"
    CHECKING = "checking"
    RESTORING = "restoring"
    RESTARTING = "restarting"
    DONE = "done"
    FAILED = "failed"


ENDED = (Phase.DONE, Phase.FAILED)


class Do(StrEnum):
    """What the adapter has to do next; it then reports the outcome."""

    WAIT = "wait"
    SWITCH = "switch"
    SWITCH_BACK = "switch back"
    RESTART = "restart"


class Seen(Struct, frozen=True, kw_only=True):
    """The server, as it is now.

    requests: those it holds by its own figures, None where these are older than the drain. relayed: requests under way
    through the agent. role: by its own words. ready: it runs and its last health check, made in this phase, was good.
    """

    requests: int | None
    relayed: int
    role: str
    ready: bool


class Outcome(StrEnum):
    """What a server said to a change of role."""

    DONE = "done"
    BUSY = "busy"
    REFUSED = "refused"
    BROKEN = "broken"
    UNKNOWN = "unknown"


class RoleChange:
    """One drain (`new_role` empty) or change of role. `step` until it ends; `switched` after each switch asked for."""

    def __init__(self, server: str, old_role: str, new_role: str, deadline_s: float, limits: SiteLimits, clock: Clock):
        """deadline_s: for draining. limits: `role_switch_timeout_s` for each later phase."""
        self.server = server
        self.old_role = old_role
        self.new_role = new_role
        self.phase = Phase.DRAINING
        self.reason = ""
        """Why it failed."""
        self._clock = clock
        self._drain = Deadline(clock, deadline_s)
        self._timeout_s = limits.role_switch_timeout_s
        self._phase_deadline = self._drain
        self._left = False

    @property
    def ended(self) -> bool:
        return self.phase in ENDED

    @property
    def accepts(self) -> bool:
        """Whether requests that a router had already sent are still relayed."""
        return self.phase in (Phase.DRAINING, *ENDED)

    @property
    def text(self) -> str:
        """For people: what it is doing."""
        if not self.new_role:
            return str(self.phase)
        return f"{self.phase}, {self.old_role} to {self.new_role}"

    def step(self, seen: Seen) -> Do:
        """Look again; what to do now."""
        match self.phase:
            case Phase.DRAINING:
                return self._draining(seen)
            case Phase.CHECKING:
                return self._checking(seen)
            case Phase.RESTORING:
                return self._restoring(seen)
            case Phase.RESTARTING:
                return self._restarting(seen)
        return Do.WAIT

    def switched(self, outcome: Outcome, message: str) -> Do:
        """What the server said to a switch, there or back."""
        if self.phase is Phase.RESTORING:
            return Do.WAIT if outcome in (Outcome.DONE, Outcome.UNKNOWN) else self._restart(message)
        if self.phase is not Phase.SWITCHING:
            return Do.WAIT
        match outcome:
            case Outcome.DONE | Outcome.UNKNOWN:
                self.reason = message if outcome is Outcome.UNKNOWN else ""
                self._enter(Phase.CHECKING)
            case Outcome.BUSY if not self._drain.expired:
                self.phase, self._phase_deadline = Phase.DRAINING, self._drain
            case Outcome.BROKEN:
                return self._restart(message)
            case _:
                self._fail(message)
        return Do.WAIT

    def lost(self, reason: str) -> None:
        """The process ended, or the site stops: there is nothing left to change."""
        if not self.ended:
            self._fail(reason)

    def _draining(self, seen: Seen) -> Do:
        if seen.requests == 0 and seen.relayed == 0:
            if not self.new_role:
                self.phase = Phase.DRAINED
                return Do.WAIT
            self._enter(Phase.SWITCHING)
            return Do.SWITCH
        if self._drain.expired:
            held = (
                f"{max(seen.requests or 0, seen.relayed)} requests" if seen.requests is not None else "it is not known"
            )
            self._fail(f"not without requests after {self._drain.budget_s:g} s: {held} left")
        return Do.WAIT

    def _checking(self, seen: Seen) -> Do:
        if seen.ready and seen.role == self.new_role:
            self.reason = ""
            self.phase = Phase.DONE
            return Do.WAIT
        if not self._phase_deadline.expired:
            return Do.WAIT
        if seen.role == self.old_role and seen.ready:
            self._fail(self.reason or f"it is still {self.old_role}")
            return Do.WAIT
        self.reason = f"not healthy as {self.new_role} within {self._timeout_s:g} s"
        self._enter(Phase.RESTORING)
        return Do.SWITCH_BACK

    def _restoring(self, seen: Seen) -> Do:
        if seen.ready and seen.role == self.old_role:
            self._fail(f"{self.reason}; it was made {self.old_role} again")
            return Do.WAIT
        return self._restart("it could not be made what it was") if self._phase_deadline.expired else Do.WAIT

    def _restarting(self, seen: Seen) -> Do:
        self._left = self._left or not seen.ready
        if self._left and seen.ready:
            self._fail(f"{self.reason}; it was restarted as {seen.role}")
        return Do.WAIT

    def _restart(self, message: str) -> Do:
        self.reason = f"{self.reason}; {message}" if self.reason else message
        self.phase, self._left = Phase.RESTARTING, False
        return Do.RESTART

    def _enter(self, phase: Phase) -> None:
        self.phase = phase
        self._phase_deadline = Deadline(self._clock, self._timeout_s)

    def _fail(self, reason: str) -> None:
        self.phase, self.reason = Phase.FAILED, reason


class Standing(Struct, frozen=True):
    """A server as the rules see it. available: ready, and neither drained nor changing. switches: it can."""

    name: str
    role: str
    available: bool
    switches: bool


def refusal(
    servers: Iterable[Standing], name: str, new_role: str, site_role: str, limits: SiteLimits, busy: str
) -> str:
    """Why a server may not be drained (`new_role` empty) or change its role now; empty where it may.

    busy: the server of the site that is changing already, empty for none. Enough servers of its present role stay
    available: `min_prefill_servers` and `min_decode_servers`."""
    known = {server.name: server for server in servers}
    server = known.get(name)
    if server is None:
        return f"no such server; the site has {', '.join(known)}"
    if busy:
        return f"server {busy} is being drained or changed; one at a time"
    if not server.available:
        return "it is not ready"
    if new_role and not server.switches:
        return "it cannot change its role; start it with --enable-pd-role-switch"
    if new_role == "decode" and site_role == "prfaas":
        return "a prfaas site has no decode servers"
    if new_role == server.role:
        return ""
    others = sum(one.available and one.role == server.role for one in known.values()) - 1
    least = limits.min_prefill_servers if server.role == "prefill" else limits.min_decode_servers
    if others < least:
        key = f"limits.min_{server.role}_servers"
        return f"{others} other {server.role} servers would stay available, {key} is {least}"
    return ""
