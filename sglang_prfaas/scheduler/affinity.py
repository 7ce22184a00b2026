"""Cached prefixes of single servers against their queues: where in a site a request is served soonest.

A server that holds a longer prefix has less to compute, and may have a longer queue. Expected time to serve is wait +
T_prefill(tokens left to compute there). A holder that is loaded so gives way to another server, which computes the
prefix once and holds it from then on: prefixes spread with their use.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from sglang_prfaas.scheduler.types import SiteView


class Serving(Struct, frozen=True):
    """The best that a site can do for one request. base_s: T_prefill on a server without a prefix of its own."""

    tokens: int
    wait_s: float
    seconds: float
    base_s: float


def best_serving(site: SiteView, l_total: int, least_wait_s: float, prefill_s: Callable[[float], float]) -> Serving:
    """The least wait + T_prefill over the servers of a site. least_wait_s: of its least loaded prefill server.

    Writes into the view what each holder saves over the others (`saved_s`), which is how a server is then chosen.
    """
    tokens = max(0, l_total - site.cached_tokens)
    base_s = prefill_s(float(tokens))
    best = Serving(tokens, least_wait_s, base_s, base_s)
    site.saved_s = {}
    for server in site.servers if site.affinity else ():
        held = site.affinity.get(server.name, 0)
        if held <= site.cached_tokens or not server.alive or server.role != "prefill":
            continue
        tokens = max(0, l_total - held)
        seconds = prefill_s(float(tokens))
        site.saved_s[server.name] = base_s - seconds
        if server.wait_s + seconds < best.wait_s + best.seconds:
            best = Serving(tokens, server.wait_s, seconds, base_s)
    return best
