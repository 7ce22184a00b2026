"""What a rank takes computing to cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_prfaas.config.schema import PrefixCacheConfig
from sglang_prfaas.core.kv_layout import KvLayout
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.curves import Curve
from sglang_prfaas.scheduler.profiles import PrefillProfile, ProfileFile, save_profile

hicache_peers = pytest.importorskip("sglang_prfaas.sglang_plugin.hicache_peers")


def profile(path: Path, **seconds: float) -> str:
    curves = {
        name: PrefillProfile(time_s=Curve(x=(1, 1000), y=(0.001, value)), gpus=8, origin="test")
        for name, value in seconds.items()
    }
    save_profile(
        ProfileFile(model="m", kv=KvLayout(full_bytes_per_token=1.0), prefill=curves, decode={}), path / "p.json"
    )
    return str(path / "p.json")


def test_tokens_per_second_or_the_only_curve_or_the_named_one(tmp_path: Path) -> None:
    assert hicache_peers.prefill_time(PrefixCacheConfig(prefill_tokens_per_s=100.0)).at(50) == 0.5
    one = profile(tmp_path, h200=1.0)
    assert hicache_peers.prefill_time(PrefixCacheConfig(prefill_profile=one)).at(1000) == 1.0
    two = profile(tmp_path, h200=1.0, h20=3.0)
    named = PrefixCacheConfig(prefill_profile=two, prefill_hardware="h20")
    assert hicache_peers.prefill_time(named).at(1000) == 3.0
    with pytest.raises(ConfigError, match="h20, h200"):
        hicache_peers.prefill_time(PrefixCacheConfig(prefill_profile=two))
    with pytest.raises(ConfigError, match="prefill_tokens_per_s"):
        hicache_peers.prefill_time(PrefixCacheConfig())
