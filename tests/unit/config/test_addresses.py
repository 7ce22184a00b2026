"""What may stand where a host or a URL is wanted."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.addresses import host_problem, network_problem, url_problem
from sglang_prfaas.config.checks import router_findings, site_findings
from sglang_prfaas.config.load import load_router, load_site
from tests.unit.config.conftest import PD, ROUTER, WriteToml


@pytest.mark.parametrize(
    "host", ["10.2.0.21", "0.0.0.0", "::", "fd00::21", "[fd00::21]", "fe80::1%eth0", "localhost", "node_7.example.org."]
)
def test_hosts(host: str) -> None:
    assert host_problem(host) == ""


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("10.2.0.999", "neither an address nor a name"),
        ("10.2.0", "neither an address nor a name"),
        ("fd00::zz", "neither an address nor a name"),
        ("-node", "neither an address nor a name"),
        ("two words", "neither an address nor a name"),
        ("", "neither an address nor a name"),
        ("http://10.2.0.21", "a URL or a path"),
        ("10.2.0.21:9000", "has a port; write '10.2.0.21'"),
    ],
)
def test_what_are_no_hosts(host: str, text: str) -> None:
    assert text in host_problem(host)


@pytest.mark.parametrize("url", ["http://10.0.0.1:9000", "https://[fd00::20]:9000/below", "http://gw.example.org"])
def test_urls(url: str) -> None:
    assert url_problem(url) == ""


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("10.0.0.1:9000", 'write "http://10.0.0.1:9000"'),
        ("ftp://10.0.0.1", "neither http:// nor https://"),
        ("http://[::1:90", "is no URL"),
        ("http://10.0.0.1:99999", "Port out of range"),
        ("http://:9000", "neither an address nor a name"),
    ],
)
def test_what_are_no_urls(url: str, text: str) -> None:
    assert text in url_problem(url)


def test_places_of_a_site() -> None:
    assert [network_problem(text) for text in ("10.2.0.0/24", "fd00::/8", "10.1.0.11", "gw.example.org")] == [""] * 4
    assert "no network" in network_problem("10.2.0.0/99")
    assert "neither an address nor a name" in network_problem("10.2.0.256")


def test_every_host_of_a_file_is_looked_at(write: WriteToml) -> None:
    more = 'host = "127.0.0.1:9000"\n[transport]\nadvertise_host = "1.2.3.456"\nbind_host = "x y"\n'
    findings = site_findings(load_site(write("site.toml", PD + more), check=False))
    wrong = {finding.path for finding in findings if finding.fatal}
    assert {"transport.advertise_host", "transport.bind_host", "agent.host"} <= wrong


def test_a_url_that_is_none_is_one_finding_of_a_router(write: WriteToml) -> None:
    text = ROUTER.replace("http://127.0.0.1:9000", "http://[127.0.0.1:9000")
    assert text != ROUTER
    findings = router_findings(load_router(write("r.toml", text), check=False))
    assert [finding.path.rpartition(".")[2] for finding in findings] == ["agent_url"]
