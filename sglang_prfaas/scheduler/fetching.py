"""A prefix that only a PD site holds: what a PrfaaS site may expect of fetching it, against computing it.

The store of a prefill server decides for itself when the request is there (`store.fetch_choice`); the expectation here
is made of the same terms, so that both come to the same, as far as the router's curves and links are right. The link is
taken to carry as much towards the PrfaaS site as from it: only what leaves that site is measured.
"""

from __future__ import annotations

from collections.abc import Callable

from sglang_prfaas.config.schema import PrefixCacheConfig
from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.scheduler.affinity import Serving
from sglang_prfaas.scheduler.short_term import site_prefix
from sglang_prfaas.scheduler.types import Observation, SiteView

MARGIN = PrefixCacheConfig().fetch_margin
"""Share of the time to compute that a fetch has to save; a site may have set its own."""


def with_fetch(
    observation: Observation,
    site: SiteView,
    there: Serving,
    l_total: int,
    least_wait_s: float,
    kv: KvLayout,
    prefill_s: Callable[[float], float],
) -> Serving:
    """`there`, or what the site can do with the prefix of a PD site where that takes less time: RTT + bytes / rate +
    T_prefill(the rest), on any of its servers. least_wait_s: of the least loaded one.

    Then writes into the view what the holders of a prefix still save over a server that fetches (`saved_s`).
    """
    own = l_total - there.tokens
    best = there
    for home in observation.sites:
        link = observation.links.get((site.name, home.name))
        prefix = min(site_prefix(home), l_total - 1)
        if home.role != "pd" or link is None or link.bytes_per_s <= 0 or prefix <= own:
            continue
        fetch_s = link.rtt_s + kv.increment_bytes(prefix, own) / link.bytes_per_s
        rest_s = prefill_s(float(l_total - prefix))
        if fetch_s >= (1 - MARGIN) * (there.seconds - rest_s):
            continue
        seconds = fetch_s + rest_s
        if least_wait_s + seconds < best.wait_s + best.seconds:
            best = Serving(l_total - prefix, least_wait_s, seconds, seconds)
    if best is not there:
        less_s = there.base_s - best.base_s
        site.saved_s = {name: saved_s - less_s for name, saved_s in site.saved_s.items() if saved_s > less_s}
    return best
