"""Links that the prefilling site dials: which keys have to fit."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_prfaas.config.checks import deployment_findings, site_findings
from sglang_prfaas.config.gateway import gateway_address, offered_ports
from sglang_prfaas.config.schema import (
    AgentConfig,
    LinkConfig,
    ServerConfig,
    SiteConfig,
    SiteSection,
    TransportConfig,
)
from sglang_prfaas.errors import ConfigError


def far(link: dict[str, Any], host: str = "127.0.0.1", mover_port: int = 31000, **transport: Any) -> SiteConfig:
    return SiteConfig(
        site=SiteSection(name="prfaas", role="prfaas", model="owner/model", args=["--tp", "2"]),
        servers=[
            ServerConfig(name="p0", role="prefill", host=host, port=30000, bootstrap_port=8998, mover_port=mover_port)
        ],
        agent=AgentConfig(port=9000, reports_port=9001),
        transport=TransportConfig(advertise_host="gw", **transport),
        links=[LinkConfig(to_site="pd", capacity_gbps=1.0, **link)],
    )


def near(**link: Any) -> SiteConfig:
    return SiteConfig(
        site=SiteSection(name="pd", role="pd", model="owner/model"),
        servers=[
            ServerConfig(name="p0", role="prefill", port=30000, bootstrap_port=8998),
            ServerConfig(name="d0", role="decode", port=30001),
        ],
        links=[LinkConfig(to_site="prfaas", capacity_gbps=1.0, dial="prefill", **link)],
    )


def findings(config: SiteConfig) -> list[str]:
    return [str(one) for one in site_findings(config)]


def test_what_a_site_offers_is_all_but_sglang_itself() -> None:
    config = far({"dial": "prefill", "gateway": "10.2.0.9:7000"})
    assert offered_ports(config) == dict.fromkeys((8998, 31000, 31001, 31002, 31003, 9000, 9001), "127.0.0.1")
    assert findings(config) == []


def test_ports_of_two_hosts_cannot_be_told_apart() -> None:
    config = far({"dial": "prefill", "gateway": "10.2.0.9:7000"})
    other = ServerConfig(name="p1", role="prefill", host="127.0.0.2", port=30000, bootstrap_port=8998, mover_port=32000)
    both = SiteConfig(
        site=config.site, servers=[*config.servers, other], transport=config.transport, links=config.links
    )
    with pytest.raises(ConfigError, match=r"port 8998 is used on 127\.0\.0\.1 and 127\.0\.0\.2"):
        offered_ports(both)
    assert any("port 8998 is used on" in text for text in findings(both))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (far({"dial": "prefill"}), 'links.pd.gateway: dial = "prefill" needs one'),
        (far({"gateway": "x:1"}), 'links.pd.gateway: has no effect without dial = "prefill"'),
        (far({"dial": "prefill", "gateway": "nowhere"}), "links.pd.gateway: expected HOST:PORT, got 'nowhere'"),
        (far({"dial": "prefill", "gateway": "h:7"}, mover_port=0), "server p0 has any free mover ports"),
        (near(gateway="127.0.0.1:7000", gateway_ports=[7001]), "7001 is a port of the gateway itself"),
        (near(gateway="10.2.0.9:7000", gateway_ports=[8998]), "listens on 10.2.0.9 without keys"),
    ],
)
def test_what_does_not_fit(config: SiteConfig, said: str) -> None:
    assert any(said in text for text in findings(config)), findings(config)


OUT = {"dial": "prefill", "gateway": "10.2.0.9:7000"}
ALL = [8998, 31000, 31001, 31002, 31003, 9000, 9001]


@pytest.mark.parametrize(
    ("out", "listed", "said"),
    [
        (OUT, ALL, []),
        (OUT, ALL[:-1], ["pd: links.prfaas.gateway_ports: lacks 9001 of site prfaas"]),
        (OUT, [*ALL, 30000], ["pd: links.prfaas.gateway_ports: site prfaas offers no 30000"]),
        ({}, ALL, ["pd: links.prfaas.dial: far does not say so of its link to pd"]),
        (OUT, [], ["far: links.pd.gateway_ports: either this file or pd", "pd: links.prfaas.gateway_ports: either"]),
    ],
)
def test_both_files_have_to_agree(out: dict[str, Any], listed: list[int], said: list[str]) -> None:
    files = {"far": far(out), "pd": near(gateway="127.0.0.9:7000", gateway_ports=listed)}
    found = [str(one) for one in deployment_findings(files, {}) if "links." in str(one)]
    assert len(found) == len(said), found
    assert all(any(one.startswith(text) for one in found) for text in said), found


def test_addresses() -> None:
    link = LinkConfig(to_site="pd", capacity_gbps=1.0, gateway="[2001:db8::1]:7000")
    assert gateway_address(link) == ("2001:db8::1", 7000)
