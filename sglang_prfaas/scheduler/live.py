"""The live policy: for each request the best PD site, its threshold of this moment, and whether to depart from it.

One object for the router and the simulator. It holds what is learnt, the recent lengths and the correction of the
curves, and gives every decision to `short_term.decide`. The caller writes what it sees into the observation (waits,
links, cached prefixes) and calls `look` as often as it likes to have that digested; `decide` works on the last look.

Expected TTFT of a path: wait for prefill + T_prefill(tokens to compute there) + exposed transfer. Of several PD sites
the one with the least expected TTFT serves, a request in decode counting `DECODE_S_PER_REQUEST`; of several PrfaaS
sites the one with the least over its own link.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.core.request import RequestView, Route
from sglang_prfaas.core.units import bytes_per_s_to_gbps
from sglang_prfaas.scheduler.affinity import Serving, best_serving
from sglang_prfaas.scheduler.correction import CorrectedCurve, PrefillCorrection
from sglang_prfaas.scheduler.fetching import with_fetch
from sglang_prfaas.scheduler.profiles import PrefillProfile
from sglang_prfaas.scheduler.short_term import decide, uncached_length
from sglang_prfaas.scheduler.threshold import LiveState, PathLoad, ThresholdChoice, ThresholdController
from sglang_prfaas.scheduler.ttft import exposed_transfer_s
from sglang_prfaas.scheduler.types import Decision, Figures, LinkView, Observation, Preference, SiteView

DECODE_S_PER_REQUEST = 0.01
"""What a request on the least loaded decode server counts, against expected TTFT, between PD sites."""
_REFERENCE_TOKENS = 32_768.0
_INFINITE = float("inf")


class SiteLoad(Struct):
    """One site, digested: prefill servers alive, the least wait among them, the least decode load (infinite: none)."""

    servers: int
    wait_s: float
    decode_load: float


class Way(Struct):
    """From one PrfaaS site to one PD site, digested: what does not depend on the request."""

    site: str
    link: LinkView | None
    wait_s: float
    """Until the link has sent what is ready."""
    s_per_byte: float
    state_s: float
    """The state, which is sent after prefill, and half a round trip."""


class Moment(Struct):
    """One look at all sites. `states`: what the threshold of each PD site rests on."""

    now_s: float
    loads: dict[str, SiteLoad]
    states: dict[str, LiveState]
    ways: dict[str, list[Way]] = {}
    """By PD site, from every PrfaaS site with a server alive; filled when a decision first needs it."""


class _Path(Struct):
    """What one request may expect of one path."""

    tokens: int
    wait_s: float
    ttft_s: float
    link: LinkView | None = None


class LivePolicy:
    """Decisions for the PD sites in `local`, with the PrfaaS sites in `prfaas`; profiles by site."""

    def __init__(
        self,
        *,
        kv: KvLayout,
        local: Mapping[str, PrefillProfile],
        prfaas: Mapping[str, PrefillProfile],
        settings: PolicyConfig,
    ) -> None:
        self._kv, self._settings = kv, settings
        self.correction = PrefillCorrection(bound=settings.max_correction, half_life_s=settings.correction_half_life_s)
        self.profiles = {**local, **prfaas}
        self._curves = {
            site: CorrectedCurve(profile.time_s, self.correction, site) for site, profile in self.profiles.items()
        }
        self._pd, self._prfaas = list(local), list(prfaas)
        # The threshold of a PD site knows one other path: servers of further PrfaaS sites count in those of the first.
        reference = self._prfaas[0] if self._prfaas else self._pd[0]
        reference_s = self._curves[reference].at(_REFERENCE_TOKENS)
        self._worth = {site: reference_s / self._curves[site].at(_REFERENCE_TOKENS) for site in self._prfaas}
        self._controllers = {
            site: ThresholdController(
                local=self._curves[site],
                prfaas=self._curves[reference],
                kv=kv,
                start_t_tokens=settings.threshold_tokens,
                window=settings.window_requests,
                solve_interval_s=settings.solve_interval_s,
                hysteresis=settings.hysteresis,
            )
            for site in self._pd
        }
        self.choices: dict[str, ThresholdChoice] = {}
        self._faded_s = 0.0

    # --- what is seen -----------------------------------------------------------------------------------------------

    def look(self, now_s: float, observation: Observation) -> Moment:
        """Digest the servers and links of an observation."""
        loads = {site.name: _site_load(site) for site in observation.sites}
        states = {}
        for home in self._pd:
            if home not in loads:
                continue
            servers = cut_off = bytes_per_s = 0.0
            wait_s = _INFINITE
            for site in self._prfaas:
                link = observation.links.get((site, home))
                load = loads.get(site)
                if load is None or not load.servers:
                    continue
                if link is not None and link.bytes_per_s <= 0:
                    cut_off += load.servers
                    continue
                servers += load.servers * self._worth[site]
                bytes_per_s += link.bytes_per_s if link is not None else _INFINITE
                wait_s = min(wait_s, max(load.wait_s, link.wait_s if link is not None else 0.0))
            states[home] = LiveState(
                now_s=now_s,
                prfaas=PathLoad(servers=servers or cut_off, wait_s=wait_s),
                local=PathLoad(servers=loads[home].servers, wait_s=loads[home].wait_s),
                link_gbps=bytes_per_s_to_gbps(bytes_per_s),
            )
        if now_s - self._faded_s >= self._settings.solve_interval_s:
            self._faded_s = now_s
            self.correction.fade(now_s)
        return Moment(now_s, loads, states)

    def observe(self, now_s: float, local_tokens: int, prfaas_tokens: int, home: str = "") -> None:
        """Count one request: the tokens that either path would have to compute."""
        self._controllers[home or self._pd[0]].observe(now_s, local_tokens, prfaas_tokens)

    def learn(self, now_s: float, site: str, tokens: float, measured_s: float) -> None:
        """A prefill of `tokens` kept a server of `site` busy for `measured_s`."""
        self.correction.learn(now_s, site, tokens, measured_s, self.profiles[site].time_s.at(tokens))

    def prefill_s(self, site: str, tokens: float) -> float:
        """T_prefill at a site, corrected."""
        return self._curves[site].at(tokens)

    def exposed_s(self, link: LinkView | None, input_tokens: int, held_tokens: int, prefill_s: float) -> float:
        """The part of a transfer over `link` that prefill does not hide."""
        if link is None:
            return 0.0
        return exposed_transfer_s(
            total_bytes=self._kv.increment_bytes(input_tokens, held_tokens),
            state_bytes=self._kv.state_bytes,
            prefill_s=prefill_s,
            bytes_per_s=link.free_bytes_per_s,
            rtt_s=link.rtt_s,
        )

    # --- decisions --------------------------------------------------------------------------------------------------

    def threshold(self, state: LiveState, local_tokens: int, prfaas_tokens: int, home: str = "") -> ThresholdChoice:
        """t of a PD site for one request."""
        home = home or self._pd[0]
        choice = self.choices[home] = self._controllers[home].choose(state, local_tokens, prfaas_tokens)
        return choice

    def decide(self, moment: Moment, observation: Observation, request: RequestView) -> Decision:
        """Route one request. Writes t and the costs of this request at each site into the observation."""
        sites = {site.name: site for site in observation.sites}
        home, near, far = self._best_pd_site(moment, observation, sites, request.l_total)
        state = moment.states[home]
        if not request.avoid:
            self.observe(moment.now_s, near.tokens, far.tokens, home)
        choice = self.threshold(state, near.tokens, far.tokens, home)
        observation.t_tokens = choice.t_tokens
        link = far.link
        used = 1.0 - link.free_bytes_per_s / link.bytes_per_s if link is not None and link.bytes_per_s > 0 else 0.0
        figures = Figures(
            pd_site=home,
            t_balanced=choice.t_balanced,
            utilisation=choice.utilisation,
            local_tokens=near.tokens,
            prfaas_tokens=far.tokens,
            local_wait_s=near.wait_s,
            prfaas_wait_s=far.wait_s,
            local_ttft_s=near.ttft_s,
            prfaas_ttft_s=far.ttft_s,
            link_gbps=state.link_gbps,
            egress_utilisation=used,
            bandwidth_scarce=observation.bandwidth_scarce,
        )
        prefer = None
        if request.forced is None and not request.avoid:
            uncached = uncached_length(observation, request, home)
            wanted, other = (far, near) if uncached > choice.t_tokens else (near, far)
            prefer = self._preference(wanted, other, near)
        refused = self._refusal(request, near, far)
        if refused:
            uncached = uncached_length(observation, request, home)
            most = self._settings.max_wait_s
            retry_s = max(1.0, min(near.wait_s, far.wait_s) - most)
            return Decision(
                None, None, None, refused, "busy_prefill", choice.t_tokens, uncached, figures, retry_after_s=retry_s
            )
        decision = decide(observation, request, home=home, prefer=prefer)
        return msgspec.structs.replace(decision, reason=f"{decision.reason}; {choice.reason}", figures=figures)

    def bind(self, moment: Moment, observation: Observation, request: RequestView, home: str) -> Decision:
        """Servers for a request whose PD site and path (`request.forced`) are chosen already."""
        sites = {site.name: site for site in observation.sites}
        l_total = request.l_total
        prefill = self._prefill_far(moment, observation, sites, l_total)
        if home in moment.states:
            at_home = self._prefill(moment, sites[home], l_total)
            if len(self._prfaas) > 1:
                moving_bytes = self._kv.increment_bytes(l_total, l_total - at_home.tokens) - self._kv.state_bytes
                self._write_costs(moment, sites, prefill, self._ways(moment, observation, home), moving_bytes)
        return decide(observation, request, home=home)

    def _best_pd_site(
        self, moment: Moment, observation: Observation, sites: dict[str, SiteView], l_total: int
    ) -> tuple[str, _Path, _Path]:
        """The PD site to serve a request of l_total tokens, and what to expect there of either path."""
        best: tuple[str, _Path, _Path] | None = None
        least = _INFINITE
        prefill = self._prefill_far(moment, observation, sites, l_total)
        total_bytes = self._kv.size_bytes(l_total) - self._kv.state_bytes
        for home in moment.states:
            load = moment.loads[home]
            if best is not None and load.decode_load == _INFINITE:
                continue
            at_home = self._prefill(moment, sites[home], l_total)
            near = _Path(at_home.tokens, at_home.wait_s, at_home.wait_s + at_home.seconds)
            moving_bytes = total_bytes - self._kv.full_bytes_per_token * (l_total - at_home.tokens)
            far = self._far(moment, observation, home, prefill, moving_bytes, l_total)
            score = min(near.ttft_s, far.ttft_s) + DECODE_S_PER_REQUEST * load.decode_load
            if best is None or score < least:
                best, least = (home, near, far), score
        assert best is not None
        if len(self._prfaas) > 1:
            home, near, _ = best
            moving_bytes = self._kv.increment_bytes(l_total, l_total - near.tokens) - self._kv.state_bytes
            self._write_costs(moment, sites, prefill, moment.ways[home], moving_bytes)
        return best

    def _prefill(self, moment: Moment, site: SiteView, l_total: int) -> Serving:
        """What a site can do for a request of l_total tokens, on its best server."""
        return best_serving(site, l_total, moment.loads[site.name].wait_s, self._curves[site.name].at)

    def _prefill_far(
        self, moment: Moment, observation: Observation, sites: dict[str, SiteView], l_total: int
    ) -> dict[str, Serving]:
        """The same of every PrfaaS site, which may fetch what a PD site holds."""
        found = {name: self._prefill(moment, sites[name], l_total) for name in self._prfaas if _alive(moment, name)}
        if not observation.bandwidth_scarce:
            for name, there in found.items():
                wait_s, curve = moment.loads[name].wait_s, self._curves[name].at
                found[name] = with_fetch(observation, sites[name], there, l_total, wait_s, self._kv, curve)
        return found

    def _far(
        self,
        moment: Moment,
        observation: Observation,
        home: str,
        prefill: dict[str, Serving],
        moving_bytes: float,
        l_total: int,
    ) -> _Path:
        """The PrfaaS site of the least expected TTFT. `moving_bytes`: what is sent while prefill computes.

        `exposed_s`, with all but the request itself worked out before: this runs for every pair of sites."""
        ways = moment.ways.get(home)
        if ways is None:
            ways = moment.ways[home] = self._ways(moment, observation, home)
        found, least_s, waited_s = None, _INFINITE, _INFINITE
        for way in ways:
            there = prefill[way.site]
            late_s = moving_bytes * way.s_per_byte - there.seconds
            wait_s = way.wait_s if way.wait_s > there.wait_s else there.wait_s
            ttft_s = wait_s + way.state_s + there.seconds + (late_s if late_s > 0 else 0.0)
            if found is None or ttft_s < least_s:
                found, least_s, waited_s = way, ttft_s, wait_s
        if found is None:
            return _Path(l_total, _INFINITE, _INFINITE)
        return _Path(prefill[found.site].tokens, waited_s, least_s, found.link)

    def _ways(self, moment: Moment, observation: Observation, home: str) -> list[Way]:
        found = []
        for name in self._prfaas:
            if not _alive(moment, name):
                continue
            link = observation.links.get((name, home))
            if link is None:
                found.append(Way(name, None, 0.0, 0.0, 0.0))
                continue
            s_per_byte = 1 / link.free_bytes_per_s if link.free_bytes_per_s > 0 else _INFINITE
            state_s = self._kv.state_bytes * s_per_byte + link.rtt_s / 2 if s_per_byte < _INFINITE else _INFINITE
            found.append(Way(name, link, link.wait_s, s_per_byte, state_s))
        return found

    def _write_costs(
        self,
        moment: Moment,
        sites: dict[str, SiteView],
        prefill: dict[str, Serving],
        ways: list[Way],
        moving_bytes: float,
    ) -> None:
        for way in ways:
            there = prefill[way.site]
            link_s = max(0.0, way.wait_s - moment.loads[way.site].wait_s)
            exposed_s = way.state_s + max(0.0, moving_bytes * way.s_per_byte - there.seconds)
            sites[way.site].cost_s = link_s + there.base_s + exposed_s

    def _preference(self, wanted: _Path, other: _Path, near: _Path) -> Preference | None:
        """The other path, where it keeps a promise that the wanted one breaks."""
        if _INFINITE in (wanted.wait_s, other.wait_s):
            return None
        route: Route = "local" if other is near else "prfaas"
        most_s, slo_s = self._settings.max_wait_s, self._settings.slo_ttft_s
        if most_s and wanted.wait_s > most_s >= other.wait_s:
            return Preference(route, "queue", f"{wanted.wait_s:.2f} s of queue there, {other.wait_s:.2f} s here")
        if slo_s and wanted.ttft_s > slo_s >= other.ttft_s:
            why = f"TTFT {wanted.ttft_s:.2f} s there, {other.ttft_s:.2f} s here, promised {slo_s:g} s"
            return Preference(route, "slo", why)
        return None

    def _refusal(self, request: RequestView, near: _Path, far: _Path) -> str:
        """Why no path may take a request; empty if one may. A retry is never refused: it was let in."""
        most_s = self._settings.max_wait_s
        if not most_s or request.avoid:
            return ""
        paths = {"local": (near,), "prfaas": (far,), None: (near, far)}[request.forced]
        wait_s = min(path.wait_s for path in paths)
        if wait_s <= most_s or wait_s == _INFINITE:
            return ""
        return f"prefill would wait {wait_s:.2f} s, more than policy.max_wait_s = {most_s:g}"


def _alive(moment: Moment, site: str) -> bool:
    return site in moment.loads and moment.loads[site].servers > 0


def _site_load(site: SiteView) -> SiteLoad:
    load = SiteLoad(0, _INFINITE, _INFINITE)
    for server in site.servers:
        if not server.alive:
            continue
        if server.role == "prefill":
            load.servers += 1
            load.wait_s = min(load.wait_s, server.wait_s)
        else:
            load.decode_load = min(load.decode_load, server.inflight_requests + server.extra_load)
    load.wait_s += site.held_s
    return load
