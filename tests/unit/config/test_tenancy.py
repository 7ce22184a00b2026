"""Rules of tenants and of the endpoints of KV events."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_prfaas.config.checks.tenancy import kv_event_findings, tenancy_findings
from sglang_prfaas.config.schema import (
    RouterConfig,
    RouterSection,
    RouterSite,
    TargetConfig,
    TenancyConfig,
    TenantConfig,
)

DIGEST = "ab" * 32
HEADER = TenancyConfig(header="x-tenant")


def router(tenancy: TenancyConfig = HEADER, *tenants: TenantConfig, **target: Any) -> RouterConfig:
    decode = TargetConfig(name="d", role="decode", url="http://h:1", **target)
    sites = [
        RouterSite(name="home", role="pd", servers=[decode]),
        RouterSite(name="far", role="prfaas", agent_url="http://h:2"),
    ]
    return RouterConfig(router=RouterSection(model="m"), sites=sites, tenancy=tenancy, tenants=list(tenants))


def salted(name: str = "a", **fields: Any) -> TenantConfig:
    return TenantConfig(name=name, cache_salt="s", **fields)


@pytest.mark.parametrize(
    ("tenancy", "tenants", "said", "fatal"),
    [
        (HEADER, [salted(), salted()], "2 tenants are named 'a'", True),
        (HEADER, [salted(api_keys=[DIGEST]), salted("b", api_keys=[DIGEST.upper()])], "is listed 2 times", True),
        (HEADER, [salted(api_keys=["sk-secret"])], "is no SHA-256", True),
        (TenancyConfig(), [salted()], "add api_keys, or set tenancy.header", True),
        (HEADER, [salted(sites=["moon"])], "which is no site of this router; it has home, far", True),
        (HEADER, [salted(sites=["far"])], "has no pd site", True),
        (HEADER, [TenantConfig(name="a")], "shared with every client", False),
        (TenancyConfig(required=True), [], "every request would be refused", True),
    ],
)
def test_what_is_wrong_with_tenants(
    tenancy: TenancyConfig, tenants: list[TenantConfig], said: str, fatal: bool
) -> None:
    found = [(text, refuses) for _, text, refuses in tenancy_findings(router(tenancy, *tenants)) if said in text]
    assert [refuses for _, refuses in found] == [fatal]


def test_right_tenants_are_right() -> None:
    assert not list(tenancy_findings(router(HEADER, salted(sites=["home"]), salted("b", api_keys=[DIGEST]))))
    assert not list(kv_event_findings(router(kv_events="tcp://[::1]:5", kv_replay="ipc:///run/x")))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kv_events": "tcp://*:5557"}, "cannot be dialled"),
        ({"kv_events": "tcp://host"}, "cannot be dialled"),
        ({"kv_events": "tcp://host:99999"}, "cannot be dialled"),
        ({"kv_replay": "tcp://host:5557"}, "used with kv_events only"),
    ],
)
def test_what_is_wrong_with_endpoints(fields: dict[str, Any], said: str) -> None:
    assert [said in text for _, text, _ in kv_event_findings(router(HEADER, **fields))] == [True]
