"""Rules that span fields, within one file."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.checks import Finding, router_findings, site_findings
from sglang_prfaas.config.load import load_router, load_site
from sglang_prfaas.config.schema import RouterConfig, SiteConfig
from tests.unit.config.conftest import PD, PRFAAS, ROUTER, WriteToml


def site(write: WriteToml, text: str) -> SiteConfig:
    return load_site(write("site.toml", text), check=False)


def router(write: WriteToml, text: str) -> RouterConfig:
    return load_router(write("router.toml", text), check=False)


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, findings
    return findings[0]


def without_server(text: str, name: str) -> str:
    before, _, after = text.partition(f'[[servers]]\nname = "{name}"')
    return before + after[after.index("\n[") + 1 :]


@pytest.mark.parametrize("text", [PD, PRFAAS])
def test_right_sites_have_no_findings(write: WriteToml, text: str) -> None:
    assert site_findings(site(write, text)) == []


def test_a_right_router_has_no_findings(write: WriteToml) -> None:
    assert router_findings(router(write, ROUTER)) == []


def test_a_pd_site_without_decode(write: WriteToml) -> None:
    finding = only(site_findings(site(write, without_server(PD, "decode-0"))))
    assert finding.fatal
    assert finding.text.startswith("a pd site needs a decode server; add [[servers]] with role")


def test_a_pd_site_without_prefill_needs_a_link(write: WriteToml) -> None:
    alone = without_server(PD, "prefill-0")
    finding = only(site_findings(site(write, alone)))
    assert finding.fatal
    assert "nothing prefills" in finding.text
    linked = alone + '[[links]]\nto_site = "prfaas"\ncapacity_gbps = 10\n'
    finding = only(site_findings(site(write, linked)))
    assert not finding.fatal


def test_a_prfaas_site_with_decode(write: WriteToml) -> None:
    text = PD.replace('name = "pd"\nrole = "pd"', 'name = "pd"\nrole = "prfaas"')
    finding = only(site_findings(site(write, text)))
    assert finding.path == "servers.decode-0.role"
    assert "has no decode servers" in finding.text


@pytest.mark.parametrize(
    ("old", "new", "path", "words"),
    [
        ("port = 30001", "port = 30000", "servers.decode-0.port", "wants port 30000, which server prefill-0 has"),
        (
            "bootstrap_port = 8998",
            "bootstrap_port = 30001",
            "servers.decode-0.port",
            "the bootstrap of server prefill-0",
        ),
        (
            "port = 9000",
            "port = 31000",
            "agent.port",
            "the agent wants port 31000, which the mover of server prefill-0",
        ),
        (
            "mover_port = 31000\n",
            'mover_port = 8995\nargs = ["--tp", "2"]\n',
            "servers.prefill-0.mover_port",
            "wants ports 8995-8998",
        ),
        (
            "mover_port = 31000\n",
            'mover_port = 65533\nargs = ["--tp=4"]\n',
            "servers.prefill-0.mover_port",
            "write at most 65528",
        ),
        ("bootstrap_port = 8998\n", "", "servers.prefill-0.bootstrap_port", "write for example bootstrap_port = 8998"),
        ('name = "decode-0"', 'name = "prefill-0"', "servers", "2 servers are named 'prefill-0'"),
        ('model = "owner/model"', 'model = "/no/such/model"', "site.model", "no such directory"),
        ('model = "owner/model"', 'model = "~/model"', "site.model", "not expanded"),
        (
            "port = 30001\n",
            'port = 30001\nargs = ["--port", "1"]\n',
            "servers.decode-0.args",
            "--port is set by the key servers.decode-0.port",
        ),
        (
            'model = "owner/model"\n',
            'model = "owner/model"\nargs = ["--model-path=x"]\n',
            "site.args",
            "--model-path is set by the key site.model",
        ),
        ('model = "owner/model"\n', 'model = "owner/model"\nargs = ["--tp 2"]\n', "site.args", 'write "--tp", "2"'),
        (
            "port = 30001\n",
            'port = 30001\nargs = ["--enable-pd-role-switch"]\n',
            "servers.decode-0.bootstrap_port",
            "starts a bootstrap here too",
        ),
        (
            "port = 30001\n",
            'port = 30001\nenv = { PRFAAS_CONNECTIONS = "2" }\n',
            "servers.decode-0.env.PRFAAS_CONNECTIONS",
            "is set by the key transport.connections",
        ),
        (
            "[agent]",
            '[[links]]\nto_site = "pd"\ncapacity_gbps = 1\n[agent]',
            "links.pd.to_site",
            "this is the site itself",
        ),
    ],
)
def test_one_fault_one_finding(write: WriteToml, old: str, new: str, path: str, words: str) -> None:
    assert old in PD
    finding = only(site_findings(site(write, PD.replace(old, new, 1))))
    assert finding.fatal
    assert finding.path == path
    assert words in finding.text


def test_ports_on_different_addresses_do_not_clash(write: WriteToml) -> None:
    text = PD.replace("port = 30001", 'port = 30000\nhost = "127.0.0.2"')
    assert site_findings(site(write, text)) == []
    text = PD.replace("port = 30001", 'port = 30000\nhost = "0.0.0.0"')
    assert only(site_findings(site(write, text))).path == "servers.decode-0.port"


def test_keys_that_a_decode_server_does_not_use_are_a_warning(write: WriteToml) -> None:
    finding = only(site_findings(site(write, PD.replace("port = 30001", "port = 30001\nbootstrap_port = 8999"))))
    assert not finding.fatal


@pytest.mark.parametrize(
    ("old", "new", "path", "words"),
    [
        ('agent_url = "http://127.0.0.1:9000"\n', "", "sites.pd", "has neither agent_url nor servers"),
        (
            'agent_url = "http://127.0.0.1:9000"',
            'agent_url = "127.0.0.1:9000"',
            "sites.pd.agent_url",
            'write "http://127.0.0.1:9000"',
        ),
        ('name = "prfaas"', 'name = "pd"', "sites", "2 sites are named 'pd'"),
        ('name = "pd"\nrole = "pd"', 'name = "pd"\nrole = "prfaas"', "sites", "no site decodes"),
        (
            'agent_url = "http://127.0.0.1:9000"\n',
            'agent_url = "http://127.0.0.1:9000"\n[[sites.servers]]\nname = "d"\nrole = "decode"\nurl = "http://h:1"\n',
            "sites.pd",
            "has agent_url and servers",
        ),
        (
            'agent_url = "http://127.0.0.1:9010"\n',
            '[[sites.servers]]\nname = "p"\nrole = "prefill"\nurl = "http://h:1"\n',
            "sites.prfaas.servers.p.bootstrap_port",
            "a prefill server needs one",
        ),
        (
            "threshold_tokens = 2000\n",
            "threshold_tokens = 2000\n[policy.roles]\nhorizon_s = 40.0\n",
            "policy.roles.horizon_s",
            "write a longer horizon",
        ),
        (
            "threshold_tokens = 2000\n",
            "threshold_tokens = 2000\n[policy.roles]\nslot_period_s = 100.0\n",
            "policy.roles.slot_period_s",
            "write a longer period, or 0",
        ),
        (
            'threshold_tokens = 2000\n\n[[sites]]\nname = "pd"\nrole = "pd"\nagent_url = "http://127.0.0.1:9000"\n',
            '[policy.roles]\nenabled = true\n[[sites]]\nname = "pd"\nrole = "pd"\n'
            '[[sites.servers]]\nname = "d"\nrole = "decode"\nurl = "http://h:1"\n',
            "policy.roles.enabled",
            "agent that takes commands",
        ),
        (
            "threshold_tokens = 2000\n",
            'threshold_tokens = 2000\norder = "ordered"\n',
            "policy.order",
            "needs measured curves",
        ),
        (
            'agent_url = "http://127.0.0.1:9010"\n',
            '[[sites.servers]]\nname = "d"\nrole = "decode"\nurl = "http://h:1"\n',
            "sites.prfaas.servers.d.role",
            "a prfaas site has no decode servers",
        ),
    ],
)
def test_one_fault_of_a_router_one_finding(write: WriteToml, old: str, new: str, path: str, words: str) -> None:
    assert old in ROUTER
    finding = only(router_findings(router(write, ROUTER.replace(old, new, 1))))
    assert finding.fatal
    assert finding.path == path
    assert words in finding.text


def test_a_router_without_a_prfaas_site_is_warned(write: WriteToml) -> None:
    text = ROUTER[: ROUTER.index('[[sites]]\nname = "prfaas"')]
    assert not only(router_findings(router(write, text))).fatal


BEYOND = PD.replace("[agent]", '[transport]\nbind_host = "0.0.0.0"\n\n[agent]')


def test_no_keys_beyond_this_machine(write: WriteToml) -> None:
    finding = only(site_findings(site(write, BEYOND)))
    assert finding.path == "transport.keys_dir"
    assert finding.fatal
    for part in ("server prefill-0", "0.0.0.0", "launch keys DIR", 'security = "off"'):
        assert part in finding.text


def test_no_keys_beyond_this_machine_but_so_it_is_meant(write: WriteToml) -> None:
    finding = only(site_findings(site(write, BEYOND.replace("[transport]", '[transport]\nsecurity = "off"'))))
    assert not finding.fatal
    assert "whoever reaches it can read and forge KVCache" in finding.text


def test_keys_beyond_this_machine(write: WriteToml) -> None:
    assert site_findings(site(write, BEYOND.replace("[transport]", '[transport]\nkeys_dir = "/keys"'))) == []


@pytest.mark.parametrize(
    ("lines", "path", "fatal"),
    [
        ('security = "keys"', "transport.security", True),
        ('keys_dir = "~/keys"', "transport.keys_dir", True),
        ('security = "off"\nkeys_dir = "/keys"', "transport.security", False),
    ],
)
def test_security_settings_that_do_not_fit(write: WriteToml, lines: str, path: str, fatal: bool) -> None:
    finding = only(site_findings(site(write, PD.replace("[agent]", f"[transport]\n{lines}\n\n[agent]"))))
    assert (finding.path, finding.fatal) == (path, fatal)


LINKED = ROUTER + '[[sites.links]]\nto_site = "pd"\ncapacity_gbps = 100\n'


def live(text: str, policy: str) -> str:
    return text.replace("threshold_tokens = 2000", policy)


def test_a_live_policy_needs_a_profile_and_its_links(write: WriteToml) -> None:
    assert router_findings(router(write, live(LINKED, 'profile = "paper"'))) == []
    finding = only(router_findings(router(write, live(LINKED, 'mode = "live"'))))
    assert finding.path == "policy.mode"
    assert 'write policy.profile = "FILE"' in finding.text
    finding = only(router_findings(router(write, live(ROUTER, 'profile = "paper"'))))
    assert (finding.path, finding.fatal) == ("sites.prfaas.links", True)
    assert 'to_site = "pd" and capacity_gbps' in finding.text
    finding = only(router_findings(router(write, live(LINKED, 'profile = "/no/such.toml"'))))
    assert "no such file" in finding.text


def test_what_a_fixed_threshold_does_not_use(write: WriteToml) -> None:
    finding = only(router_findings(router(write, live(LINKED, 'mode = "fixed"\nprofile = "paper"'))))
    assert (finding.path, finding.fatal) == ("policy.profile", False)
    finding = only(router_findings(router(write, live(ROUTER, "slo_ttft_s = 2.0"))))
    assert (finding.path, finding.fatal) == ("policy.slo_ttft_s", False)


def test_links_of_a_router(write: WriteToml) -> None:
    finding = only(router_findings(router(write, LINKED.replace('to_site = "pd"', 'to_site = "elsewhere"'))))
    assert "which is no pd site of this router; it has pd" in finding.text
    coded = LINKED.replace('to_site = "pd"', 'to_site = "pd"\ncodec = "fp8"')
    assert "a router moves no KVCache" in only(router_findings(router(write, coded))).text
    twice = LINKED + '[[sites.links]]\nto_site = "pd"\ncapacity_gbps = 10\n'
    assert "2 links lead to site 'pd'" in only(router_findings(router(write, twice))).text
