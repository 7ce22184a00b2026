"""Rules about the agent's reports port, and the router's connections to it."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.checks import Finding, deployment_findings, router_findings, site_findings
from sglang_prfaas.config.load import load_router, load_site
from tests.unit.config.conftest import PD, ROUTER, WriteToml

REPORTS = PD + "reports_port = 9001\n"
DIALLED = ROUTER.replace(
    'agent_url = "http://127.0.0.1:9000"', 'agent_url = "http://127.0.0.1:9000"\nreports_port = 9001'
)


def of_site(write: WriteToml, text: str) -> list[Finding]:
    return site_findings(load_site(write("site.toml", text), check=False))


def of_router(write: WriteToml, text: str) -> list[Finding]:
    return router_findings(load_router(write("router.toml", text), check=False))


def test_right_ones_have_no_findings(write: WriteToml) -> None:
    assert of_site(write, REPORTS) == []
    assert of_router(write, DIALLED) == []
    pd = load_site(write("pd.toml", REPORTS))
    assert deployment_findings({"pd.toml": pd}, {"r.toml": load_router(write("r.toml", DIALLED))})[1:] == []


@pytest.mark.parametrize(
    ("change", "path", "text", "fatal"),
    [
        ({"port = 9000\n": "port = 0\n"}, "agent.port", "need the agent's HTTP port too", True),
        ({"reports_port": 'host = "10.0.0.1"\nreports_port'}, "agent.reports_port", "without keys", True),
        ({"reports_port": "tls = true\nreports_port"}, "agent.tls", "needs keys; write transport.keys_dir", True),
        ({"reports_port = 9001": "reports_port = 30001"}, "agent.reports_port", "wants port 30001", True),
    ],
)
def test_a_sites_port(write: WriteToml, change: dict[str, str], path: str, text: str, fatal: bool) -> None:
    changed = REPORTS
    for old, new in change.items():
        changed = changed.replace(old, new)
    (finding,) = of_site(write, changed)
    assert (finding.path, finding.fatal) == (path, fatal)
    assert text in finding.text


def test_off_is_a_warning(write: WriteToml) -> None:
    text = REPORTS.replace("reports_port", 'host = "10.0.0.1"\nreports_port') + '\n[transport]\nsecurity = "off"\n'
    (finding,) = of_site(write, text)
    assert (finding.path, finding.fatal) == ("agent.reports_port", False)


@pytest.mark.parametrize(
    ("old", "new", "path", "text"),
    [
        ("http://127.0.0.1:9000", "http://10.0.0.1:9000", "sites.pd.reports_port", "set reports.keys_dir"),
        ("[policy]", '[reports]\nsecurity = "keys"\n\n[policy]', "reports.security", "needs keys"),
        ("[policy]", '[reports]\nkeys_dir = "~/keys"\n\n[policy]', "reports.keys_dir", "write the whole path"),
    ],
)
def test_a_routers_connections(write: WriteToml, old: str, new: str, path: str, text: str) -> None:
    (finding,) = of_router(write, DIALLED.replace(old, new))
    assert (finding.path, finding.fatal) == (path, True)
    assert text in finding.text


def test_a_router_and_a_site_that_differ(write: WriteToml) -> None:
    pd = load_site(write("pd.toml", REPORTS.replace("9001", "9002")))
    router = load_router(write("r.toml", DIALLED))
    found = [f for f in deployment_findings({"pd.toml": pd}, {"r.toml": router}) if f.path == "sites.pd.reports_port"]
    assert [f.text for f in found] == [
        "is 9001, the site's file says 9002 (agent.reports_port); right only behind a port forwarding"
    ]


def test_an_agent_in_clear_beside_keys_is_a_warning(write: WriteToml) -> None:
    keys = '\n[transport]\nkeys_dir = "/keys"\n'
    (finding,) = of_site(write, REPORTS.replace("reports_port", 'host = "10.0.0.1"\nreports_port') + keys)
    assert (finding.path, finding.fatal) == ("agent.tls", False)
    assert of_site(write, REPORTS.replace("reports_port", 'host = "10.0.0.1"\ntls = true\nreports_port') + keys) == []
    off = keys + 'security = "off"\n'
    findings = of_site(write, REPORTS.replace("reports_port", "tls = true\nreports_port") + off)
    assert [f.text for f in findings if f.fatal] == [
        'needs keys, and transport.security is "off"; remove one of the two'
    ]


@pytest.mark.parametrize(("tls", "scheme", "fatal"), [("true", "http", True), ("false", "https", False)])
def test_the_routers_scheme_is_the_agents(write: WriteToml, tls: str, scheme: str, fatal: bool) -> None:
    pd = load_site(write("pd.toml", REPORTS.replace("reports_port", f"tls = {tls}\nreports_port")), check=False)
    router = load_router(write("r.toml", DIALLED.replace("http://127.0.0.1:9000", f"{scheme}://127.0.0.1:9000")))
    found = [f for f in deployment_findings({"pd.toml": pd}, {"r.toml": router}) if f.path == "sites.pd.agent_url"]
    assert [(f.fatal, f"tls = {tls}" in f.text) for f in found] == [(fatal, True)]
