"""Keys of `[prefix_cache]` that others fill in."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from sglang_prfaas.config.schema import LinkConfig, PrefixCacheConfig, SiteConfig

DEFAULT_CAPACITY_GBPS = 1.0
"""Of a peer of which nothing is known."""


def serve_host(config: SiteConfig) -> str:
    """Where the prefix cache is served."""
    return config.prefix_cache.serve_host or config.agent.host


def with_links(cache: PrefixCacheConfig, links: Sequence[LinkConfig]) -> PrefixCacheConfig:
    """The configuration with what `[[links]]` say of peers, where the peers' own keys do not."""
    known = {link.to_site: link for link in links}
    peers = []
    for peer in cache.peers:
        link = known.get(peer.name)
        capacity_gbps = peer.capacity_gbps or (link.capacity_gbps if link else DEFAULT_CAPACITY_GBPS)
        rtt_ms = peer.rtt_ms or (link.rtt_ms if link else 0.0)
        peers.append(msgspec.structs.replace(peer, capacity_gbps=capacity_gbps, rtt_ms=rtt_ms))
    return msgspec.structs.replace(cache, peers=peers)
