"""The hook table against the installed SGLang, and what a server does when it does not hold."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sglang_prfaas.sglang_plugin.hooks import HOOKS
from sglang_prfaas.sglang_plugin.inner_rail.overrides import OVERRIDES
from sglang_prfaas.sglang_plugin.linear_attention import hooks as linear_attention
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
from sglang_prfaas.sglang_plugin.inner_rail.overrides import OVERRIDES
assert hooks.unapplied() == []
assert hooks.problems_with(OVERRIDES) == []
print("all in place")
"""


def test_every_entry_fits_the_installed_sglang() -> None:
    result = _python(LOAD)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "all in place" in result.stdout


def test_every_entry_has_a_reason_and_is_checked() -> None:
    hooks = (*HOOKS, *linear_attention.ENTRY, *linear_attention.KERNELS, *OVERRIDES)
    assert all(hook.reason and hook.target.startswith("sglang.srt.") for hook in hooks)
    assert len({hook.target for hook in hooks}) == len(hooks)


CHANGED = """
from sglang_prfaas.sglang_plugin.hooks import Hook, problems_with
utils = "sglang.srt.disaggregation.utils"
missing = Hook(utils + ".no_such_thing", "around", (), "is made up")
changed = Hook(utils + ".get_kv_class", "around", ("backend",), "is made up")
for line in problems_with((missing, changed)):
    print("problem:", line)
"""


def test_a_changed_sglang_is_noticed() -> None:
    result = _python(CHANGED)
    assert result.returncode == 0, result.stderr[-4000:]
    found = [line for line in result.stdout.splitlines() if line.startswith("problem:")]
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


NO_PREFILL_FLAG = """
import sys
from sglang_prfaas.sglang_plugin.linear_attention import hooks
hooks.ENTRY += (hooks.Hook("sglang.srt.no_such_module.thing", "around", (), "is made up"),)
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.choices import LINEAR_ATTN_KERNEL_BACKEND_CHOICES as choices
from sglang.srt.disaggregation.utils import TransferBackend
print("went on", "prfaas" in choices, TransferBackend("prfaas").value)
"""


def test_a_server_that_asks_for_prefill_by_prfaas_refuses_to_start() -> None:
    result = _python(NO_PREFILL_FLAG, "--linear-attn-prefill-backend=prfaas")
    assert result.returncode == 3
    assert "the linear attention prefill prfaas is not available in this process" in result.stderr
    assert "sglang.srt.no_such_module.thing is missing" in result.stderr
    assert "went on" not in result.stdout


def test_without_prefill_by_prfaas_the_transfer_backend_stays() -> None:
    result = _python(NO_PREFILL_FLAG, "--disaggregation-transfer-backend", "prfaas")
    assert result.returncode == 0, result.stderr[-4000:]
    assert "went on False prfaas" in result.stdout


OTHER_VERSION = """
import sglang
assert sglang.__version__ in ("0.5.23",), sglang.__version__
sglang.__version__ = "0.4.0"
from sglang.srt.plugins import load_plugins
load_plugins()
print("went on")
"""


def test_another_version_of_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("--disaggregation-transfer-backend=prfaas",)
    result = _python(OTHER_VERSION, *asked)
    assert result.returncode == 3
    assert "SGLang 0.4.0 is installed, tested are 0.5.23" in result.stderr
    monkeypatch.setenv("PRFAAS_ALLOW_UNTESTED_SGLANG", "1")
    result = _python(OTHER_VERSION, *asked)
    assert "went on" in result.stdout, result.stderr[-4000:]
