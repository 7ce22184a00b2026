"""Rules of `transport.inner_rail`."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.checks import Finding, site_findings
from sglang_prfaas.config.load import load_site
from sglang_prfaas.config.schema import TransportConfig
from sglang_prfaas.env import transport_from_env, transport_to_env
from sglang_prfaas.errors import ConfigError
from tests.unit.config.conftest import PD, PRFAAS, WriteToml

RAIL = '[transport]\ninner_rail = "mooncake"\n'


def findings(write: WriteToml, text: str) -> list[Finding]:
    return [
        found
        for found in site_findings(load_site(write("site.toml", text), check=False))
        if found.path == "transport.inner_rail"
    ]


def test_a_pd_site_may_have_one(write: WriteToml) -> None:
    assert findings(write, PD + RAIL) == []
    assert findings(write, PD) == []


def test_where_it_has_no_effect(write: WriteToml) -> None:
    (finding,) = findings(write, PRFAAS + RAIL)
    assert not finding.fatal
    assert "no decode servers" in finding.text


def test_it_needs_prfaas_beside_it(write: WriteToml) -> None:
    (finding,) = findings(write, PD.replace("[site]\n", '[site]\ntransfer_backend = "nixl"\n') + RAIL)
    assert finding.fatal
    assert 'site.transfer_backend is "nixl"' in finding.text


def test_an_unknown_one_is_refused(write: WriteToml) -> None:
    with pytest.raises(ConfigError, match=r"transport\.inner_rail"):
        load_site(write("site.toml", PD + RAIL.replace("mooncake", "ethernet")), check=False)


def test_it_reaches_the_servers() -> None:
    environ = transport_to_env(TransportConfig(inner_rail="mooncake"))
    assert environ["PRFAAS_INNER_RAIL"] == "mooncake"
    assert transport_from_env(environ).inner_rail == "mooncake"
