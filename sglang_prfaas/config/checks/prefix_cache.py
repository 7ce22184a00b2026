"""Rules of `[prefix_cache]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_prfaas.config import sglang_args
from sglang_prfaas.config.checks.finding import NOT_EXPANDED, Raw, repeated
from sglang_prfaas.config.prefix_cache import serve_host
from sglang_prfaas.config.schema import PrefixCacheConfig, ServerConfig, SiteConfig
from sglang_prfaas.config.security import NO_KEYS, beyond_this_machine

_OWN_FLAGS = (
    "--enable-hierarchical-cache",
    "--enable-hicache",
    "--hicache-storage-backend",
    "--hicache-storage-backend-extra-config",
)
_RADIX_OFF = "--disable-radix-cache"


def prefix_cache_findings(config: SiteConfig) -> Iterator[Raw]:
    """What is wrong with a site's prefix cache, or does not fit its servers' arguments."""
    cache = config.prefix_cache
    if cache.backend == "off":
        yield from _unused(cache)
        return
    if cache.backend == "local":
        if not cache.disk_dir:
            yield (
                "prefix_cache.disk_dir",
                'backend = "local" needs a directory; write for example "/var/cache/prfaas"',
                True,
            )
        if cache.mooncake_master:
            yield "prefix_cache.mooncake_master", 'not used with backend = "local"; remove it', False
    else:
        host, _, port = cache.mooncake_master.rpartition(":")
        if not (host and port.isdecimal()):
            text = f'backend = "mooncake" needs the master as "HOST:PORT", got {cache.mooncake_master!r}'
            yield "prefix_cache.mooncake_master", text, True
        if cache.disk_dir:
            text = 'not used with backend = "mooncake"; remove it, or write backend = "local"'
            yield "prefix_cache.disk_dir", text, False
    yield from _floors(cache)
    for server in config.servers:
        if server.role == "prefill":
            yield from _arguments(server, [*config.site.args, *server.args])
    if cache.serve_port:
        yield from _served(config)
    if cache.peers:
        yield from _peers(config)


def _served(config: SiteConfig) -> Iterator[Raw]:
    cache, transport = config.prefix_cache, config.transport
    keys = transport.keys_dir and transport.security != "off"
    if cache.backend != "local":
        yield "prefix_cache.serve_port", 'only disk_dir is served; write backend = "local", or serve_port = 0', True
    if not config.agent.port:
        yield "agent.port", "the agent serves the prefix cache; write for example port = 9000", True
    if keys and not cache.serve_to:
        yield "prefix_cache.serve_to", "is empty: no other site may read; write the names of those that may", False
    if not keys and beyond_this_machine(serve_host(config)):
        what = f"cached prefixes are served on {serve_host(config) or 'every address'}"
        if transport.security == "off":
            yield "prefix_cache.serve_port", f'transport.security is "off", and {what} to whoever reaches it', False
        else:
            yield "transport.keys_dir", f"{what}, {NO_KEYS}", True


def _peers(config: SiteConfig) -> Iterator[Raw]:
    cache, transport = config.prefix_cache, config.transport
    if not cache.prefill_profile and not cache.prefill_tokens_per_s:
        text = "peers need to know what computing takes; write prefill_profile, or for example 20000.0 here"
        yield "prefix_cache.prefill_tokens_per_s", text, True
    if cache.prefill_profile.startswith("~"):
        yield "prefix_cache.prefill_profile", NOT_EXPANDED, True
    for name, count in repeated(peer.name for peer in cache.peers):
        yield "prefix_cache.peers", f"{count} peers are named {name!r}; keep one per site", True
    for peer in cache.peers:
        path = f"prefix_cache.peers.{peer.name}"
        if peer.name == config.site.name:
            yield f"{path}.name", "this is the site itself; write the name of the other site", True
        if beyond_this_machine(peer.host) and not transport.keys_dir and transport.security != "off":
            yield f"{path}.host", f"{peer.host} is an address {NO_KEYS}", True


def _floors(cache: PrefixCacheConfig) -> Iterator[Raw]:
    if cache.prefix_floor + cache.transfer_floor > 1:
        text = f"with prefix_floor {cache.prefix_floor:g} it is more than host_bytes; lower one, their sum is 1 at most"
        yield "prefix_cache.transfer_floor", text, True
    if cache.transfer_floor and not cache.host_bytes:
        yield "prefix_cache.transfer_floor", "is a share of host_bytes, which is 0; write host_bytes, or 0 here", False
    if cache.prefix_floor and not cache.transfer_floor:
        text = "not used with transfer_floor = 0, where fetches take nothing of host_bytes; write transfer_floor"
        yield "prefix_cache.prefix_floor", text, False


def _unused(cache: PrefixCacheConfig) -> Iterator[Raw]:
    for key in ("disk_dir", "mooncake_master", "serve_port", "peers"):
        if getattr(cache, key):
            yield f"prefix_cache.{key}", 'not used with backend = "off"; write backend = "local" or "mooncake"', False


def _arguments(server: ServerConfig, args: Sequence[str]) -> Iterator[Raw]:
    path = f"servers.{server.name}.args"
    for flag in _OWN_FLAGS:
        if sglang_args.has(args, flag):
            yield path, f'{flag} is set by [prefix_cache]; remove it here, or write prefix_cache.backend = "off"', True
    if sglang_args.has(args, _RADIX_OFF):
        yield path, f'{_RADIX_OFF} leaves nothing to cache; remove it, or write prefix_cache.backend = "off"', True
