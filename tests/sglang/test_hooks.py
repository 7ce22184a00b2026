"""The hook table against the installed SGLang, and what a server does when it does not hold."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sglang_prfaas.sglang_plugin import hooks
from sglang_prfaas.sglang_plugin.hooks import HOOKS, Hook, problems_with
from sglang_prfaas.tiny_models import cpu_server_env

pytestmark = pytest.mark.sglang


def _python(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **cpu_server_env("qwen3")}
    return subprocess.run(
        [sys.executable, "-c", code, *argv], env=environment, capture_output=True, text=True, timeout=400, check=False
    )


LOAD = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.managers import disagg_service
from sglang.srt.disaggregation import decode, prefill
from sglang.srt.disaggregation.utils import KVClassType, TransferBackend
for module in (disagg_service, decode, prefill):
    for kind in KVClassType:
        ours = module.get_kv_class(TransferBackend("prfaas"), kind)
        fake = module.get_kv_class(TransferBackend("fake"), kind)
        if kind is KVClassType.KVARGS:
            assert ours is fake
        else:
            assert ours.__module__.startswith("sglang_prfaas."), ours
            assert fake is None or not fake.__module__.startswith("sglang_prfaas."), fake
from sglang_prfaas.sglang_plugin import hooks
assert hooks.unapplied() == []
print("all in place")
"""


def test_every_entry_fits_the_installed_sglang() -> None:
    result = _python(LOAD)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all in place" in result.stdout


def test_every_entry_has_a_reason_and_is_checked() -> None:
    assert all(hook.reason and hook.target.startswith("sglang.srt.") for hook in HOOKS)
    assert len({hook.target for hook in HOOKS}) == len(HOOKS)


def test_a_changed_sglang_is_noticed() -> None:
    missing = Hook("sglang.srt.disaggregation.utils.no_such_thing", "around", (), "is made up")
    changed = Hook("sglang.srt.disaggregation.utils.get_kv_class", "around", ("backend",), "is made up")
    found = problems_with((missing, changed))
    assert "no_such_thing is missing" in found[0]
    assert "takes (transfer_backend, class_type), expected (backend)" in found[1]


BROKEN = """
from sglang_prfaas.sglang_plugin import hooks
hooks.HOOKS += (hooks.Hook("sglang.srt.no_such_module.thing", "around", (), "is made up"),)
hooks.problems_with.__defaults__ = (hooks.HOOKS,)
from sglang.srt.plugins import load_plugins
load_plugins()
print("went on")
"""


def test_a_server_that_asks_for_prfaas_refuses_to_start() -> None:
    result = _python(BROKEN, "--disaggregation-transfer-backend", "prfaas")
    assert result.returncode == 3
    assert "prfaas is not available in this process" in result.stderr
    assert "sglang.srt.no_such_module.thing is missing" in result.stderr
    assert "went on" not in result.stdout


def test_a_server_with_another_backend_is_left_alone() -> None:
    result = _python(BROKEN, "--disaggregation-transfer-backend", "mooncake")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "went on" in result.stdout


def test_another_version_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang

    from sglang_prfaas.errors import LaunchError
    from sglang_prfaas.sglang_plugin import plugin

    assert sglang.__version__ in hooks.TESTED_SGLANG
    monkeypatch.setattr(sglang, "__version__", "0.4.0")
    with pytest.raises(LaunchError, match=r"SGLang 0\.4\.0 is installed, tested are 0\.5\.23"):
        plugin._check_version()
    monkeypatch.setenv(plugin.ALLOW_UNTESTED, "1")
    plugin._check_version()
