"""The live policy: for each request the best PD site, its threshold of this moment, and whether to depart from it.

One object for the router and the simulator. It holds what is learnt, the recent lengths and the correction of the
curves, and gives every decision to `short_term.decide`. The caller writes what it sees into the observation (waits,
links, cached prefixes) and calls `look` as often as it likes to have that digested; `decide` works on the last look.

Of several PD sites the one with the least expected TTFT serves, of several PrfaaS sites the one with the least over its
own link (`paths.py`).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from sglang_prfaas.config.schema import PolicyConfig
from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.core.request import RequestView, Route
from sglang_prfaas.core.units import bytes_per_s_to_gbps
from sglang_prfaas.scheduler.correction import CorrectedCurve, PrefillCorrection
from sglang_prfaas.scheduler.moment import Moment, site_load
from sglang_prfaas.scheduler.paths import Path, Paths
from sglang_prfaas.scheduler.profiles import PrefillProfile
from sglang_prfaas.scheduler.short_term import LeastLoaded, decide, uncached_length
from sglang_prfaas.scheduler.threshold import LiveState, PathLoad, ThresholdChoice, ThresholdController
from sglang_prfaas.scheduler.ttft import exposed_transfer_s
from sglang_prfaas.scheduler.types import Decision, Figures, LinkView, Observation, Preference

_REFERENCE_TOKENS = 32_768.0
_INFINITE = float("inf")


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
        self._promises = bool(settings.max_wait_s or settings.slo_ttft_s)
        self.correction = PrefillCorrection(bound=settings.max_correction, half_life_s=settings.correction_half_life_s)
        self.profiles = {**local, **prfaas}
        self._curves = {site: self.correction.curve(profile.time_s, site) for site, profile in self.profiles.items()}
        self._pd, self._prfaas = list(local), list(prfaas)
        self._paths = Paths(kv, self._curves, self._prfaas)
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
        loads = {site.name: site_load(site) for site in observation.sites}
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
        return Moment(now_s, loads, states, least=LeastLoaded())

    def observe(self, now_s: float, local_tokens: int, prfaas_tokens: int, home: str = "") -> None:
        """Count one request: the tokens that either path would have to compute."""
        self._controllers[home or self._pd[0]].observe(now_s, local_tokens, prfaas_tokens)

    def learn(self, now_s: float, site: str, tokens: float, measured_s: float) -> None:
        """A prefill of `tokens` kept a server of `site` busy for `measured_s`."""
        self.correction.learn(now_s, site, tokens, measured_s, self.profiles[site].time_s.at(tokens))

    def curve(self, site: str) -> CorrectedCurve:
        """T_prefill over tokens at a site, corrected."""
        return self._curves[site]

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
        home, near, far = self._paths.best(moment, observation, request.l_total)
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
        if self._promises and request.forced is None and not request.avoid:
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
        decision = decide(observation, request, home=home, prefer=prefer, least=moment.least)
        return msgspec.structs.replace(decision, reason=f"{decision.reason}; {choice.reason}", figures=figures)

    def bind(self, moment: Moment, observation: Observation, request: RequestView, home: str) -> Decision:
        """Servers for a request whose PD site and path (`request.forced`) are chosen already."""
        self._paths.write_costs(moment, observation, request.l_total, home)
        return decide(observation, request, home=home, least=moment.least)

    def _preference(self, wanted: Path, other: Path, near: Path) -> Preference | None:
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

    def _refusal(self, request: RequestView, near: Path, far: Path) -> str:
        """Why no path may take a request; empty if one may. A retry is never refused: it was let in."""
        most_s = self._settings.max_wait_s
        if not most_s or request.avoid:
            return ""
        paths = {"local": (near,), "prfaas": (far,), None: (near, far)}[request.forced]
        wait_s = min(path.wait_s for path in paths)
        if wait_s <= most_s or wait_s == _INFINITE:
            return ""
        return f"prefill would wait {wait_s:.2f} s, more than policy.max_wait_s = {most_s:g}"
