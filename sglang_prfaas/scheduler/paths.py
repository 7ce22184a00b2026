"""What one request may expect of either path, for every pair of a PD site and a PrfaaS site, and the best of them.

Expected TTFT of a path: wait for prefill + T_prefill(tokens to compute there) + exposed transfer (`ttft.py`). A request
in decode counts `DECODE_S_PER_REQUEST` against it. All of it runs for every request over all pairs, so what a request
does not change is worked out before, and pairs that cannot be the best are left out early.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.scheduler.affinity import Serving, best_serving
from sglang_prfaas.scheduler.correction import CorrectedCurve
from sglang_prfaas.scheduler.fetching import with_fetch
from sglang_prfaas.scheduler.moment import Moment, Way, Ways
from sglang_prfaas.scheduler.short_term import site_prefix
from sglang_prfaas.scheduler.types import LinkView, Observation, SiteView

DECODE_S_PER_REQUEST = 0.01
"""What a request on the least loaded decode server counts, against expected TTFT, between PD sites."""
_INFINITE = float("inf")


class Path(Struct):
    """What one request may expect of one path."""

    tokens: int
    wait_s: float
    ttft_s: float
    link: LinkView | None = None


class Paths:
    """Local prefill in PD sites, and the ways there from the sites `prfaas`; curves by site, of one correction."""

    def __init__(
        self,
        kv: KvLayout,
        curves: Mapping[str, CorrectedCurve],
        prfaas: Sequence[str],
    ) -> None:
        self._kv, self._curves, self._prfaas = kv, curves, prfaas

    def best(self, moment: Moment, observation: Observation, l_total: int) -> tuple[str, Path, Path]:
        """The PD site to serve a request of `l_total` tokens, and what to expect there of local prefill and of PrfaaS.

        The first of those with the least expected TTFT. Where there are several PrfaaS sites, their costs are written
        into the observation.
        """
        sites = {site.name: site for site in observation.sites}
        ways = moment.ways = moment.ways or self._ways(moment, observation)
        far = self._far(moment, observation, sites, ways, l_total)
        near = self._servings(moment, sites, moment.states, l_total)
        times = [(there.wait_s, there.seconds) for there in far]
        far_s = min([wait_s + ways.least_state_s + seconds for wait_s, seconds in times], default=_INFINITE)
        bounds = []
        for index, (home, here) in enumerate(zip(moment.states, near, strict=True)):
            decode_s = DECODE_S_PER_REQUEST * moment.loads[home].decode_load
            near_s = here.wait_s + here.seconds
            bounds.append(((near_s if near_s < far_s else far_s) + decode_s, index, home, near_s, decode_s))
        bounds.sort()
        total_bytes = self._kv.size_bytes(l_total) - self._kv.state_bytes
        best: tuple[float, int, str, Path] | None = None
        for bound_s, index, home, near_s, decode_s in bounds:
            if best is not None and (bound_s, index) > best[:2]:
                break  # what is added in the same order rounds alike: no score is below its bound
            moving_bytes = total_bytes - self._kv.full_bytes_per_token * (l_total - near[index].tokens)
            path = _over(ways.to[home], far, times, moving_bytes) or Path(l_total, _INFINITE, _INFINITE)
            score_s = (near_s if near_s < path.ttft_s else path.ttft_s) + decode_s
            if best is None or (score_s, index) < best[:2]:
                best = (score_s, index, home, path)
        assert best is not None
        _, index, home, path = best
        here = near[index]
        self._write_costs(moment, sites, far, home, l_total, here.tokens)
        return home, Path(here.tokens, here.wait_s, here.wait_s + here.seconds), path

    def write_costs(self, moment: Moment, observation: Observation, l_total: int, home: str) -> None:
        """Write the costs of a request into the observation, whose PD site is chosen already."""
        sites = {site.name: site for site in observation.sites}
        ways = moment.ways = moment.ways or self._ways(moment, observation)
        far = self._far(moment, observation, sites, ways, l_total)
        if home in moment.states:
            (here,) = self._servings(moment, sites, (home,), l_total)
            self._write_costs(moment, sites, far, home, l_total, here.tokens)

    def _servings(
        self, moment: Moment, sites: dict[str, SiteView], names: Iterable[str], l_total: int
    ) -> list[Serving]:
        """What each site can do for a request of l_total tokens, on its best server."""
        found = []
        for name in names:
            site, curve, wait_s = sites[name], self._curves[name], moment.loads[name].wait_s
            if site.affinity or site.saved_s:
                found.append(best_serving(site, l_total, wait_s, curve.at))
                continue
            tokens = l_total - site.cached_tokens if l_total > site.cached_tokens else 0
            seconds = curve.at(tokens)
            found.append(Serving(tokens, wait_s, seconds, seconds))
        return found

    def _far(
        self, moment: Moment, observation: Observation, sites: dict[str, SiteView], ways: Ways, l_total: int
    ) -> list[Serving]:
        """The same of the PrfaaS sites, which may fetch what a PD site holds while bandwidth is ample."""
        found = self._servings(moment, sites, ways.far, l_total)
        if observation.bandwidth_scarce:
            return found
        held = min(max((site_prefix(sites[home]) for home in moment.states), default=0), l_total - 1)
        for index, (name, there) in enumerate(zip(ways.far, found, strict=True)):
            if held > l_total - there.tokens:
                wait_s, curve = moment.loads[name].wait_s, self._curves[name].at
                found[index] = with_fetch(observation, sites[name], there, l_total, wait_s, self._kv, curve)
        return found

    def _ways(self, moment: Moment, observation: Observation) -> Ways:
        far = [name for name in self._prfaas if name in moment.loads and moment.loads[name].servers > 0]
        to = {home: [self._way(name, observation.links.get((name, home))) for name in far] for home in moment.states}
        least_state_s = min((way.state_s for ways in to.values() for way in ways), default=_INFINITE)
        return Ways(far, to, least_state_s)

    def _way(self, name: str, link: LinkView | None) -> Way:
        if link is None:
            return Way(name, None, 0.0, 0.0, 0.0)
        s_per_byte = 1 / link.free_bytes_per_s if link.free_bytes_per_s > 0 else _INFINITE
        state_s = self._kv.state_bytes * s_per_byte + link.rtt_s / 2 if s_per_byte < _INFINITE else _INFINITE
        return Way(name, link, link.wait_s, s_per_byte, state_s)

    def _write_costs(
        self,
        moment: Moment,
        sites: dict[str, SiteView],
        far: list[Serving],
        home: str,
        l_total: int,
        near_tokens: int,
    ) -> None:
        if len(self._prfaas) < 2:
            return
        assert moment.ways is not None
        moving_bytes = self._kv.increment_bytes(l_total, l_total - near_tokens) - self._kv.state_bytes
        for way, there in zip(moment.ways.to[home], far, strict=True):
            link_s, late_s = way.wait_s - moment.loads[way.site].wait_s, moving_bytes * way.s_per_byte - there.seconds
            exposed_s = way.state_s + (late_s if late_s > 0 else 0.0)
            sites[way.site].cost_s = (link_s if link_s > 0 else 0.0) + there.base_s + exposed_s


def _over(ways: list[Way], far: list[Serving], times: list[tuple[float, float]], moving_bytes: float) -> Path | None:
    """The PrfaaS site of the least expected TTFT. `times`: wait and T_prefill of each; `moving_bytes`: what is sent
    while prefill computes."""
    found, least_s, waited_s = -1, _INFINITE, _INFINITE
    for index, ((_, _, link_s, s_per_byte, state_s), (wait_s, seconds)) in enumerate(zip(ways, times, strict=True)):
        if link_s > wait_s:
            wait_s = link_s
        ttft_s = wait_s + state_s + seconds
        if ttft_s >= least_s and found >= 0:
            continue
        late_s = moving_bytes * s_per_byte - seconds
        if late_s > 0:
            ttft_s += late_s
        if found < 0 or ttft_s < least_s:
            found, least_s, waited_s = index, ttft_s, wait_s
    return Path(far[found].tokens, waited_s, least_s, ways[found].link) if found >= 0 else None
