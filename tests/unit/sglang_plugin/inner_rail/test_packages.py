"""A rail that cannot be had is one clear error before anything is loaded."""

from __future__ import annotations

import sys

import pytest

from sglang_prfaas.errors import LaunchError
from sglang_prfaas.sglang_plugin import plugin
from sglang_prfaas.sglang_plugin.inner_rail.packages import require


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    with pytest.raises(LaunchError, match=r"inner_rail is mooncake, but mooncake.engine .*sglang-prfaas\[mooncake\]"):
        require("mooncake")


def test_an_unknown_rail_is_refused() -> None:
    with pytest.raises(LaunchError, match="inner_rail is 'ethernet', expected one of none, mooncake"):
        require("ethernet")


def test_a_server_ends_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(plugin, "FEATURES", (plugin.FEATURES[0]._replace(install=lambda: None),))
    monkeypatch.setattr(plugin, "_check_version", lambda: None)
    monkeypatch.setattr(sys, "argv", ["server", "--disaggregation-transfer-backend", "prfaas"])
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    plugin.register()
    monkeypatch.setenv(plugin.INNER_RAIL, "mooncake")
    with pytest.raises(SystemExit) as ended:
        plugin.register()
    assert ended.value.code == 3
    assert "libibverbs1" in capsys.readouterr().err
