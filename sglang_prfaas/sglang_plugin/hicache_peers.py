"""The other sites that a rank's store may fetch prefixes from, as `[[prefix_cache.peers]]` names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sglang_prfaas.clock import MonotonicClock
from sglang_prfaas.config.prefix_cache import with_links
from sglang_prfaas.config.schema import PrefixCacheConfig, TransportConfig
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.profiles import load_profile
from sglang_prfaas.store.fetch_choice import PeerEstimate, PrefillTime, TokensPerSecond
from sglang_prfaas.store.remote import FetchLimits, RemoteTier
from sglang_prfaas.store.staging import OpenRoom, on_the_heap
from sglang_prfaas.store.stats import Counters
from sglang_prfaas.transport.object_client import ObjectClient
from sglang_prfaas.transport.security import load_security


def remote_tier(
    config: PrefixCacheConfig,
    transport: TransportConfig,
    *,
    namespaces: Mapping[str, str],
    payload_bytes: Mapping[str, int],
    page_tokens: int,
    least_tokens: int,
    keep: Callable[[str, memoryview], bool],
    counters: Counters,
    open_room: OpenRoom = on_the_heap,
) -> RemoteTier | None:
    """None without peers. Raises ConfigError for keys that do not fit, and for no idea of what computing takes."""
    if not config.peers:
        return None
    security = load_security(transport)
    peers = [
        (
            ObjectClient(peer.name, peer.host, peer.port, transport, security),
            PeerEstimate(peer.capacity_gbps * 1e9 / 8, peer.rtt_ms / 1e3),
        )
        for peer in with_links(config, ()).peers
    ]
    limits = FetchLimits(
        margin=config.fetch_margin,
        timeout_s=config.fetch_timeout_s,
        max_bytes=config.fetch_bytes,
        least_tokens=least_tokens,
    )
    return RemoteTier(
        peers,
        prefill_time(config),
        limits,
        namespaces=namespaces,
        payload_bytes=payload_bytes,
        page_tokens=page_tokens,
        keep=keep,
        counters=counters,
        clock=MonotonicClock(),
        open_room=open_room,
    )


def prefill_time(config: PrefixCacheConfig) -> PrefillTime:
    """What computing takes on this server. Raises ConfigError."""
    if not config.prefill_profile:
        if not config.prefill_tokens_per_s:
            raise ConfigError("prefix_cache.peers need prefill_profile or prefill_tokens_per_s; write one of them")
        return TokensPerSecond(config.prefill_tokens_per_s)
    profile = load_profile(config.prefill_profile)
    hardware = config.prefill_hardware
    if not hardware:
        if len(profile.prefill) != 1:
            raise ConfigError(
                f"prefix_cache.prefill_hardware: {config.prefill_profile} has prefill curves of "
                f"{', '.join(sorted(profile.prefill))}; write one of them"
            )
        (hardware,) = profile.prefill
    return profile.prefill_on(hardware).time_s
