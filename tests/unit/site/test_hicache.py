"""Flags of a site's prefix cache."""

from __future__ import annotations

import json

import msgspec
import pytest

from sglang_prfaas.config import sglang_args
from sglang_prfaas.config.schema import (
    CachePeerConfig,
    LinkConfig,
    PrefixCacheConfig,
    ServerConfig,
    SiteConfig,
    SiteSection,
)
from sglang_prfaas.site.commands import site_commands

LOCAL = PrefixCacheConfig(backend="local", disk_dir="/cache", host_bytes=1 << 30)


def commands(cache: PrefixCacheConfig, args: list[str] | None = None) -> dict[str, tuple[str, ...]]:
    config = SiteConfig(
        site=SiteSection(name="pd", role="pd", model="m", args=args or []),
        servers=[
            ServerConfig(name="p", role="prefill", port=1000, bootstrap_port=1001),
            ServerConfig(name="d", role="decode", port=1002),
        ],
        prefix_cache=cache,
        links=[LinkConfig(to_site="other", capacity_gbps=8.0, rtt_ms=20.0)],
    )
    return {command.name: command.argv for command in site_commands(config)}


def test_off_by_default() -> None:
    for argv in commands(PrefixCacheConfig()).values():
        assert not any("hi" + "cache" in arg or "hierarchical" in arg for arg in argv)


def test_prefill_servers_get_the_backend_and_the_section() -> None:
    argv = commands(LOCAL)
    assert not sglang_args.has(argv["d"], "--enable-hierarchical-cache")
    assert sglang_args.has(argv["p"], "--enable-hierarchical-cache")
    assert sglang_args.value(argv["p"], "--hicache-storage-backend") == "dynamic"
    extra = json.loads(sglang_args.value(argv["p"], "--hicache-storage-backend-extra-config") or "")
    assert extra["module_path"] == "sglang_prfaas.sglang_plugin.hicache_store"
    assert (extra["backend"], extra["disk_dir"], extra["host_bytes"]) == ("local", "/cache", 1 << 30)
    assert extra["interface_v1"]
    assert extra["hicache_storage_pass_prefix_keys"] is True


@pytest.mark.parametrize("policy", ["timeout", None])
def test_the_prefetch_policy_can_be_chosen(policy: str | None) -> None:
    args = ["--hicache-storage-prefetch-policy", policy] if policy else []
    argv = commands(LOCAL, args)["p"]
    assert sglang_args.value(argv, "--hicache-storage-prefetch-policy") == (policy or "wait_complete")
    assert argv.count("--hicache-storage-prefetch-policy") == 1


def test_servers_learn_of_peers_and_the_links_to_them() -> None:
    peers = [CachePeerConfig(name="other", host="10.0.0.1", port=9100)]
    argv = commands(msgspec.structs.replace(LOCAL, peers=peers))["p"]
    extra = json.loads(sglang_args.value(argv, "--hicache-storage-backend-extra-config") or "")
    expected = {"name": "other", "host": "10.0.0.1", "port": 9100, "capacity_gbps": 8.0, "rtt_ms": 20.0}
    assert extra["peers"] == [expected]
