"""What SGLang could ask of the plugin and does not get: the refusal says what to do instead."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sglang_prfaas.tiny_models import cpu_server_env

pytestmark = pytest.mark.sglang

REFUSALS = """
from types import SimpleNamespace
from sglang_prfaas.errors import ConfigError
from sglang_prfaas.sglang_plugin.hicache_store import PrfaasHiCacheStore
from sglang_prfaas.sglang_plugin.manager import PrfaasKVManager

def refused(call, *values):
    try:
        call(*values)
    except ConfigError as error:
        assert '"interface_v1": 1' in str(error), error
        return True

local = {"backend": "local", "disk_dir": "/nowhere"}
assert refused(PrfaasHiCacheStore, SimpleNamespace(extra_config=local))
store = PrfaasHiCacheStore(SimpleNamespace(extra_config={"interface_v1": 1, **local}))
assert all(refused(call, "00") for call in (store.get, store.batch_get, store.set, store.batch_set))

reasons = []
PrfaasKVManager.submit_prefill_recompute(SimpleNamespace(), SimpleNamespace(abort=reasons.append), {})
assert "--disaggregation-decode-retraction-backup" in reasons[0]
print("all refused")
"""


def test_refusals_say_what_to_do() -> None:
    """A store without the interface that names prefixes; a request that is to be computed again on its prefill server,
    which fails alone."""
    environment = {**os.environ, **cpu_server_env("qwen3")}
    result = subprocess.run(
        [sys.executable, "-c", REFUSALS], env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all refused" in result.stdout
