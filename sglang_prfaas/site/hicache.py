"""SGLang's flags for a site's prefix cache. Pure."""

from __future__ import annotations

import msgspec

from sglang_prfaas.config import sglang_args
from sglang_prfaas.config.schema import PrefixCacheConfig, ServerRole

MODULE = "sglang_prfaas.sglang_plugin.hicache_store"
CLASS = "PrfaasHiCacheStore"
PREFETCH_THRESHOLD_TOKENS = 64
"""Shorter hits are computed: SGLang's own default is 256."""


def hicache_flags(config: PrefixCacheConfig, role: ServerRole, args: tuple[str, ...]) -> tuple[str, ...]:
    """The flags of one server, beside its own `args`; none for a decode server or without a prefix cache."""
    if config.backend == "off" or role != "prefill":
        return ()
    extra = {
        "backend_name": "prfaas",
        "module_path": MODULE,
        "class_name": CLASS,
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "prefetch_threshold": PREFETCH_THRESHOLD_TOKENS,
        **msgspec.to_builtins(config),
    }
    flags = ["--enable-hierarchical-cache", "--hicache-storage-backend", "dynamic"]
    flags += ["--hicache-storage-backend-extra-config", msgspec.json.encode(extra).decode()]
    if not sglang_args.has(args, "--hicache-storage-prefetch-policy"):
        flags += ["--hicache-storage-prefetch-policy", "wait_complete"]
    return tuple(flags)
