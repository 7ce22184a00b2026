"""Checks across the files of one deployment."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.checks import Finding, deployment_findings
from sglang_prfaas.config.load import load_router, load_site
from tests.unit.config.conftest import PD, PRFAAS, ROUTER, WriteToml


def findings(write: WriteToml, pd: str = PD, prfaas: str = PRFAAS, router: str = ROUTER) -> list[Finding]:
    sites = {
        "pd.toml": load_site(write("pd.toml", pd), check=False),
        "prfaas.toml": load_site(write("prfaas.toml", prfaas), check=False),
    }
    return deployment_findings(sites, {"router.toml": load_router(write("router.toml", router), check=False)})


def test_a_right_deployment_has_no_findings(write: WriteToml) -> None:
    assert findings(write) == []


def test_two_sites_of_one_name(write: WriteToml) -> None:
    texts = [str(finding) for finding in findings(write, prfaas=PRFAAS.replace('name = "prfaas"', 'name = "pd"'))]
    assert any("is also the name of pd.toml" in text for text in texts)
    assert any("no such site" in text for text in texts)


@pytest.mark.parametrize("port", ["30000", "8998", "31000", "9000"])
def test_port_clashes_between_files(write: WriteToml, port: str) -> None:
    (finding,) = findings(write, prfaas=PRFAAS.replace("port = 30010", f"port = {port}"))
    assert finding.fatal
    assert finding.source == "prfaas.toml"
    assert f"wants port {port}" in finding.text
    assert "pd.toml" in finding.text


def test_the_same_port_on_all_addresses_is_a_warning_between_files(write: WriteToml) -> None:
    everywhere = PRFAAS.replace("port = 30010", 'port = 30000\nhost = "0.0.0.0"')
    (finding,) = findings(write, prfaas=everywhere)
    assert not finding.fatal
    assert "if both run on one machine" in finding.text


@pytest.mark.parametrize(
    ("old", "new", "path", "fatal", "words"),
    [
        ('name = "prfaas"', 'name = "other"', "sites.other.name", True, "no such site in the given files"),
        ('role = "prfaas"', 'role = "pd"', "sites.prfaas.role", True, 'says role = "prfaas"'),
        (":9010", ":9011", "sites.prfaas.agent_url", False, "the site's agent listens on 9010"),
        (
            'agent_url = "http://127.0.0.1:9010"',
            '[[sites.servers]]\nname = "prefill-0"\nrole = "prefill"\nurl = "http://h:1"\nbootstrap_port = 1',
            "sites.prfaas.servers.prefill-0.bootstrap_port",
            True,
            "says 9998",
        ),
        (
            'agent_url = "http://127.0.0.1:9010"',
            '[[sites.servers]]\nname = "p9"\nrole = "prefill"\nurl = "http://h:1"\nbootstrap_port = 9998',
            "sites.prfaas.servers.p9.name",
            True,
            "it has prefill-0",
        ),
        ('model = "owner/model"', 'model = "owner/other"', "router.served_model_name", True, "write one name in both"),
    ],
)
def test_the_router_and_its_sites(write: WriteToml, old: str, new: str, path: str, fatal: bool, words: str) -> None:
    assert old in ROUTER
    (finding,) = findings(write, router=ROUTER.replace(old, new, 1))
    assert (finding.path, finding.fatal) == (path, fatal)
    assert words in finding.text


def test_an_agent_that_the_site_does_not_start(write: WriteToml) -> None:
    (finding,) = findings(write, prfaas=PRFAAS.replace("[agent]\nport = 9010", ""))
    assert finding.fatal
    assert "starts no agent" in finding.text


def test_a_link_to_an_unknown_site_is_a_warning(write: WriteToml) -> None:
    (finding,) = findings(write, pd=PD + '[[links]]\nto_site = "elsewhere"\ncapacity_gbps = 1\n')
    assert not finding.fatal


def test_keys_in_one_site_only(write: WriteToml) -> None:
    (finding,) = findings(write, pd=PD.replace("[agent]", '[transport]\nkeys_dir = "/keys"\n\n[agent]'))
    assert finding.source == "prfaas.toml"
    assert finding.text == "no keys here, but in pd.toml; give every site of a deployment its keys, or none"


CACHE = '\n[prefix_cache]\nbackend = "local"\ndisk_dir = "/c"\n'
ASKING = PRFAAS + CACHE + "prefill_tokens_per_s = 1.0\n"
ASKING += '[[prefix_cache.peers]]\nname = "pd"\nhost = "127.0.0.1"\nport = 9100\n'
SERVING = PD + CACHE + "serve_port = 9100\n"


@pytest.mark.parametrize(
    ("pd", "path", "fatal", "words"),
    [
        (PD, "prefix_cache.peers.pd.port", True, "serves no prefix cache"),
        (SERVING.replace("9100", "9200"), "prefix_cache.peers.pd.port", False, "serves on 9200"),
        (PD.replace('name = "pd"', 'name = "pd2"'), "prefix_cache.peers.pd.name", False, "describes that site"),
        (SERVING, "", False, ""),
    ],
)
def test_a_prefix_cache_that_is_asked_is_served(write: WriteToml, pd: str, path: str, fatal: bool, words: str) -> None:
    router = ROUTER.replace('name = "pd"', 'name = "pd2"') if "pd2" in pd else ROUTER
    found = findings(write, pd=pd, prfaas=ASKING, router=router)
    assert [(finding.path, finding.fatal) for finding in found] == ([(path, fatal)] if path else [])
    assert all(words in finding.text for finding in found)


def test_with_keys_the_asking_site_is_listed(write: WriteToml) -> None:
    keys = '\n[transport]\nkeys_dir = "/k"\n'
    (finding,) = findings(write, pd=SERVING + keys, prfaas=ASKING + keys)
    assert "serve_to" in finding.text
    assert findings(write, pd=SERVING + 'serve_to = ["prfaas"]\n' + keys, prfaas=ASKING + keys) == []
