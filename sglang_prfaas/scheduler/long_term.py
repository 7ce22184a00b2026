"""The long timescale: which server of a PD site should change its role, if any (PrfaaS section 3.4.3).

A pure state machine: an observation every minute or so in, a command or nothing out, the result of the command in. A
switch is worth it where the requests that it lets through over the horizon are more than those that it costs while the
server drains and switches, by a margin, in several observations in a row. One server at a time, never below one of each
role, and after a switch that failed only after a while that doubles.
"""

from __future__ import annotations

from msgspec import Struct

from sglang_prfaas.config.schema import RolesConfig
from sglang_prfaas.scheduler.forecast import SeasonalForecast
from sglang_prfaas.scheduler.role_capacity import PdLoad, RoleCapacity
from sglang_prfaas.scheduler.types import ServerRole


class RoleServer(Struct, frozen=True):
    """A server of the PD site that is in rotation."""

    name: str
    role: ServerRole
    inflight_requests: int = 0


class RoleObservation(Struct, frozen=True, kw_only=True):
    """A PD site at one moment. `load` must count the servers that `servers` lists."""

    now_s: float
    site: str
    servers: list[RoleServer]
    load: PdLoad


class RoleCommand(Struct, frozen=True, kw_only=True):
    """Change one server's role. Rates in requests a second."""

    site: str
    server: str
    role: ServerRole
    reason: str
    demand: float
    rate_now: float
    rate_then: float


class _Slots(Struct, frozen=True):
    """A time-shared mix: N_p on average, and the rates of the best whole mix and of this one."""

    n_p: float
    whole_rate: float
    rate: float


class RolePolicy:
    """Decides role changes of one PD site; `limits` says when one is worth it, as `[policy.roles]` of the router."""

    def __init__(
        self, capacity: RoleCapacity, limits: RolesConfig | None = None, forecast: SeasonalForecast | None = None
    ) -> None:
        self._capacity, self._limits = capacity, limits or RolesConfig()
        self._forecast = forecast or SeasonalForecast()
        self._wanted: ServerRole | None = None
        self._in_a_row = self._failures = 0
        self._not_before_s = float("-inf")
        self._switching = False
        self.reason = "no observation yet"
        """Why the last decision was as it was."""

    def decide(self, seen: RoleObservation) -> RoleCommand | None:
        """Learn an observation, and say which server should change, if any. Then `finished` has to be called."""
        self._forecast.observe(seen.now_s, seen.load.arrival_rate)
        if self._switching:
            return self._stay("a switch is under way")
        if seen.now_s < self._not_before_s:
            return self._stay(f"the next switch is possible in {self._not_before_s - seen.now_s:.0f} s")
        counts = (seen.load.n_p, seen.load.n_d)
        if min(counts) < 1:
            return self._stay(f"N_p {counts[0]}, N_d {counts[1]}: both must be 1 or more before one can change")
        demand = self._limits.headroom * max(
            seen.load.arrival_rate, self._forecast.peak(seen.now_s, self._limits.horizon_s)
        )
        slots = self._slots(seen, demand)
        return self._whole(seen, demand) if slots is None else self._follow(seen, slots, demand)

    def finished(self, now_s: float, succeeded: bool) -> None:
        """The result of the command that `decide` gave."""
        limits = self._limits
        self._switching, self._wanted, self._in_a_row = False, None, 0
        self._failures = 0 if succeeded else self._failures + 1
        after_success_s = 0.0 if limits.slot_period_s else limits.settle_s
        rest_s = after_success_s if succeeded else limits.backoff_s * 2 ** min(4, self._failures - 1)
        self._not_before_s = now_s + rest_s

    def _whole(self, seen: RoleObservation, demand: float) -> RoleCommand | None:
        """The better one of the two neighbouring mixes, if it pays."""
        n_p, n_d = seen.load.n_p, seen.load.n_d
        options: list[tuple[ServerRole, tuple[float, float], tuple[float, float]]] = []
        if n_d > 1:
            options.append(("prefill", (n_p + 1, n_d - 1), (n_p, n_d - 1)))
        if n_p > 1:
            options.append(("decode", (n_p - 1, n_d + 1), (n_p - 1, n_d)))
        if not options:
            return self._stay(f"N_p {n_p}, N_d {n_d}: one of each role has to stay")
        asked = [(float(n_p), float(n_d)), *(then for _, then, _ in options), *(during for _, _, during in options)]
        now, *rates = self._capacity.rates(seen.load, asked)
        best: tuple[float, ServerRole, float] | None = None
        for (role, _, _), then, during in zip(options, rates, rates[len(options) :], strict=False):
            won = (min(demand, then) - min(demand, now)) * (self._limits.horizon_s - self._limits.cost_s)
            lost = max(0.0, min(demand, now) - min(demand, during)) * self._limits.cost_s
            net = won - lost
            if best is None or net > best[0]:
                best = (net, role, then)
        assert best is not None
        net, role, then = best
        share = net / (demand * self._limits.horizon_s) if demand > 0 else 0.0
        figures = f"N_p {n_p}, N_d {n_d}, demand {demand:.2f}/s: {now:.2f}/s now, {then:.2f}/s with one more {role}"
        if share <= self._limits.min_gain:
            self._wanted, self._in_a_row = None, 0
            return self._stay(f"{figures}; net gain {share:.1%}, needs more than {self._limits.min_gain:.1%}")
        self._in_a_row = self._in_a_row + 1 if role == self._wanted else 1
        self._wanted = role
        if self._in_a_row < self._limits.confirm:
            return self._stay(f"{figures}; net gain {share:.1%}, seen {self._in_a_row} of {self._limits.confirm} times")
        return self._command(seen, role, f"{figures}; net gain {share:.1%}", demand, now, then)

    def _slots(self, seen: RoleObservation, demand: float) -> _Slots | None:
        """The best time-shared mix, where it pays.

        Two switches a period cost the alternating server `2 cost_s / period` of its time, half of it from either role.
        """
        period_s = self._limits.slot_period_s
        total = seen.load.n_p + seen.load.n_d
        if not period_s or total < 3:
            return None
        lost = self._limits.cost_s / period_s
        whole = [(float(n_p), float(total - n_p)) for n_p in range(1, total)]
        shares = [part / 10 for part in range(1, 10) if lost < part / 10 < 1 - lost]
        means = [n_p + share for n_p in range(1, total - 1) for share in shares]
        rates = self._capacity.rates(seen.load, [*whole, *((mean - lost, total - mean - lost) for mean in means)])
        best_whole, shared = max(rates[: len(whole)]), rates[len(whole) :]
        best = max(shared, default=0.0)
        if min(demand, best) <= min(demand, best_whole) * (1 + self._limits.min_gain):
            return None
        return _Slots(means[shared.index(best)], best_whole, best)

    def _follow(self, seen: RoleObservation, slots: _Slots, demand: float) -> RoleCommand | None:
        """Prefill in the first part of each period, decode in the rest."""
        period_s, low = self._limits.slot_period_s, int(slots.n_p)
        wanted = low + (seen.now_s % period_s < (slots.n_p - low) * period_s)
        figures = (
            f"slots: N_p {slots.n_p:.1f} on average, {wanted} now, gives {slots.rate:.2f}/s, "
            f"whole servers {slots.whole_rate:.2f}/s"
        )
        if wanted == seen.load.n_p:
            return self._stay(figures)
        role: ServerRole = "prefill" if wanted > seen.load.n_p else "decode"
        return self._command(seen, role, figures, demand, slots.whole_rate, slots.rate)

    def _command(
        self, seen: RoleObservation, role: ServerRole, reason: str, demand: float, now: float, then: float
    ) -> RoleCommand:
        """The least loaded server of the other role."""
        giving = [server for server in seen.servers if server.role != role]
        server = min(giving, key=lambda server: (server.inflight_requests, server.name))
        self._switching, self.reason = True, reason
        return RoleCommand(
            site=seen.site, server=server.name, role=role, reason=reason, demand=demand, rate_now=now, rate_then=then
        )

    def _stay(self, reason: str) -> RoleCommand | None:
        self.reason = reason
        return None
