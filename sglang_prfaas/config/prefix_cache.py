"""Rules of `[prefix_cache]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sglang_prfaas.config import sglang_args
from sglang_prfaas.config.schema import PrefixCacheConfig, ServerConfig, SiteConfig

_OWN_FLAGS = (
    "--enable-hierarchical-cache",
    "--enable-hicache",
    "--hicache-storage-backend",
    "--hicache-storage-backend-extra-config",
)
_RADIX_OFF = "--disable-radix-cache"

Raw = tuple[str, str, bool]
"""Path of the key, text, whether it refuses the file."""


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
    for server in config.servers:
        if server.role == "prefill":
            yield from _arguments(server, [*config.site.args, *server.args])


def _unused(cache: PrefixCacheConfig) -> Iterator[Raw]:
    for key in ("disk_dir", "mooncake_master"):
        if getattr(cache, key):
            yield f"prefix_cache.{key}", 'not used with backend = "off"; write backend = "local" or "mooncake"', False


def _arguments(server: ServerConfig, args: Sequence[str]) -> Iterator[Raw]:
    path = f"servers.{server.name}.args"
    for flag in _OWN_FLAGS:
        if sglang_args.has(args, flag):
            yield path, f'{flag} is set by [prefix_cache]; remove it here, or write prefix_cache.backend = "off"', True
    if sglang_args.has(args, _RADIX_OFF):
        yield path, f'{_RADIX_OFF} leaves nothing to cache; remove it, or write prefix_cache.backend = "off"', True
