"""Environment variables of the plugin."""

from __future__ import annotations

import pytest

from sglang_prfaas import env
from sglang_prfaas.config.schema import LinkConfig, TransportConfig
from sglang_prfaas.env import (
    link_codecs_from_env,
    link_codecs_to_env,
    port_from_env,
    transport_from_env,
    transport_to_env,
)
from sglang_prfaas.errors import ConfigError


def test_round_trip() -> None:
    config = TransportConfig(connections=7, bind_host="::", waiting_timeout_s=1.5, congestion_control="cubic")
    assert transport_from_env(transport_to_env(config)) == config


def test_nothing_set_means_defaults() -> None:
    assert transport_from_env({}) == TransportConfig()


@pytest.mark.parametrize(
    ("name", "value"), [("PRFAAS_CONNECTIONS", "80"), ("PRFAAS_CONNECTIONS", "x"), ("PRFAAS_WAITING_TIMEOUT_S", "-1")]
)
def test_a_bad_value_names_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: .*{value}"):
        transport_from_env({name: value})


def test_codecs_of_links() -> None:
    links = [LinkConfig(to_site="far", capacity_gbps=1, codec="fp8"), LinkConfig(to_site="near", capacity_gbps=1)]
    assert link_codecs_to_env(links[1:]) == {}
    assert link_codecs_from_env(
        link_codecs_to_env([*links, LinkConfig(to_site="b", capacity_gbps=1, codec="raw")])
    ) == {
        "far": "fp8",
        "b": "raw",
    }
    assert link_codecs_from_env({}) == {}
    for text in ("far", "far=zip", "=fp8", "far=fp8;near=raw"):
        with pytest.raises(ConfigError, match=r"PRFAAS_LINK_CODECS: expected SITE=raw\|fp8\|int8\|shuffle, got"):
            link_codecs_from_env({"PRFAAS_LINK_CODECS": text})
    with pytest.raises(ConfigError, match=r"PRFAAS_CODEC: .*zip"):
        transport_from_env({"PRFAAS_CODEC": "zip"})


def test_ports() -> None:
    assert port_from_env({}) == 0
    assert port_from_env({"PRFAAS_MOVER_PORT": "31000"}) == 31000
    for text in ("-1", "70000", "any", ""):
        with pytest.raises(ConfigError, match="expected a port from 0 to 65535"):
            port_from_env({"PRFAAS_MOVER_PORT": text})


def test_links_come_back_from_the_environment() -> None:
    links = [LinkConfig(to_site="pd", capacity_gbps=10.0, rtt_ms=5.0), LinkConfig(to_site="b", capacity_gbps=1.0)]
    assert env.links_from_env({env.LINKS: env.links_to_env(links)}) == {link.to_site: link for link in links}
    assert env.links_from_env({}) == {}
    with pytest.raises(ConfigError, match="PRFAAS_LINKS"):
        env.links_from_env({env.LINKS: "[{]"})
