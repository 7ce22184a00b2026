"""From reports of loads and links to what the scheduler looks at."""

from __future__ import annotations

from collections.abc import Callable

from sglang_prfaas.config.schema import LinkConfig
from sglang_prfaas.core.units import gbps_to_bytes_per_s
from sglang_prfaas.monitor.reports import LinkLoad, ServerLoad
from sglang_prfaas.scheduler.types import FULL, LinkView

_LEAST_SHARE = 0.01  # of a link's capacity, where it is congested and carries less: waits stay finite
_FREE_SHARE = 0.1  # what a new transfer gets of a link that is full: others make room


def reported_wait_s(load: ServerLoad, prefill_s: Callable[[float], float]) -> float:
    """Seconds of work waiting at a prefill server: by its own speed, or else by `prefill_s`, T_prefill over tokens."""
    if load.waiting <= 0:
        return 0.0
    if load.prefill_tokens_per_s > 0 and load.waiting_uncached_tokens > 0:
        return load.waiting_uncached_tokens / load.prefill_tokens_per_s
    return load.waiting * prefill_s(load.waiting_uncached_tokens / load.waiting)


def reported_decode_load(load: ServerLoad, own_requests: int, max_kv_occupancy: float) -> float:
    """`ServerView.extra_load`: requests beyond our own, those without pages counted twice, and the share of KV used."""
    others = max(0, load.running + load.waiting + load.prealloc + load.transferring - own_requests)
    used = load.kv_tokens_used / load.kv_tokens_total if load.kv_tokens_total else 0.0
    full = FULL if max_kv_occupancy < 1 and used >= max_kv_occupancy else 0.0
    return full + others + load.prealloc + min(used, 0.99)


def configured_link(link: LinkConfig) -> LinkView:
    """A link of which nothing is reported: as configured, idle."""
    bytes_per_s = gbps_to_bytes_per_s(link.capacity_gbps)
    return LinkView(bytes_per_s=bytes_per_s, free_bytes_per_s=bytes_per_s, rtt_s=link.rtt_ms / 1e3)


def measured_link(load: LinkLoad, configured: LinkView) -> LinkView:
    """A link as reported. Where more would only queue, it carries no more than now."""
    capacity = load.capacity_bytes_per_s or configured.bytes_per_s
    if load.congested:
        capacity = min(capacity, max(load.used_bytes_per_s, _LEAST_SHARE * capacity))
    return LinkView(
        bytes_per_s=capacity,
        free_bytes_per_s=max(capacity - load.used_bytes_per_s, _FREE_SHARE * capacity),
        backlog_bytes=float(load.backlog_bytes),
        rtt_s=load.rtt_s or configured.rtt_s,
        measured=True,
        congested=load.congested,
    )


def is_scarce(load: LinkLoad, max_utilisation: float) -> bool:
    """Whether a link has no room for prefixes to be fetched over it."""
    return load.congested or load.used_bytes_per_s >= max_utilisation * load.capacity_bytes_per_s > 0
