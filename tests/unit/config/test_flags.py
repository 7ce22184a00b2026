"""Flags for every key: parsing, addressing items of lists, and the help text."""

from __future__ import annotations

import shlex
import tomllib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prfaas.config import flags, keys
from sglang_prfaas.config.load import load_router, load_site
from sglang_prfaas.config.schema import RouterConfig, SiteConfig
from sglang_prfaas.errors import ConfigError
from tests.unit.config.conftest import PD, WriteToml


def overrides(line: str) -> list[flags.Override]:
    rest, found = flags.split(shlex.split(line))
    assert rest == []
    return found


def test_split_takes_flags_with_a_dot_and_leaves_the_rest() -> None:
    rest, found = flags.split(["pd.toml", "--site.name", "x", "--json-status", "--site.args=--tp 2", "a.toml"])
    assert rest == ["pd.toml", "--json-status", "a.toml"]
    assert found == [("site.name", "x"), ("site.args", "--tp 2")]


def test_a_flag_without_a_value() -> None:
    with pytest.raises(ConfigError, match=r"^--site\.name: a value is missing"):
        flags.split(["--site.name"])


def test_flags_win_over_the_file(write: WriteToml) -> None:
    config = load_site(
        write("pd.toml", PD),
        overrides(
            "--servers.decode-0.port 30005 --servers.0.host=::1 --transport.connections 8 --limits.stop_timeout_s 2 "
            "--site.args '--dtype float16' --site.env.A 1 --servers.decode-0.args '[\"--x\", \"a b\"]'"
        ),
    )
    assert config.servers[1].port == 30005
    assert config.servers[0].host == "::1"
    assert config.transport.connections == 8
    assert config.limits.stop_timeout_s == 2.0
    assert config.site.args == ["--dtype", "float16"]
    assert config.site.env == {"A": "1"}
    assert config.servers[1].args == ["--x", "a b"]


def test_a_site_from_flags_alone() -> None:
    config = load_site(
        None,
        overrides(
            "--site.name s --site.role pd --site.model a/b --servers.p.0.role prefill --servers.p.0.port 1 "
            "--servers.p.0.bootstrap_port 2 --servers.d.role decode --servers.d.port 3 --links.x.capacity_gbps 10"
        ),
    )
    assert [server.name for server in config.servers] == ["p.0", "d"]
    assert config.links[0].to_site == "x"


def test_nested_lists_and_booleans() -> None:
    config = load_router(
        None,
        overrides(
            "--router.model a/b --router.trust_remote_code true --sites.pd.role pd "
            "--sites.pd.servers.d.role decode --sites.pd.servers.d.url http://127.0.0.1:1"
        ),
    )
    assert config.router.trust_remote_code is True
    assert config.sites[0].servers[0].name == "d"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sit.name x", "--sit.name: unknown key; did you mean --site.name?"),
        ("--site.nam x", "--site.nam: unknown key; did you mean site.name?"),
        ("--servers.7.port 1", "--servers.7.port: there is no item 7; the next new one is 2"),
        ("--servers.decode-0 1", "--servers.decode-0: is a table; write --servers.decode-0.KEY VALUE"),
        ("--agent.port=x", '--agent.port: expected a whole number from 0 to 65535, got "x"'),
        ("--site.name.x=y", "--site.name.x: unknown key"),
    ],
)
def test_wrong_flags(write: WriteToml, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_site(write("pd.toml", PD), overrides(line))
    (problem,) = caught.value.problems
    assert problem.startswith(message)


@pytest.mark.parametrize("kind", [SiteConfig, RouterConfig])
def test_help_has_every_key_with_its_meaning_and_default(kind: type[msgspec.Struct]) -> None:
    text = flags.help_text(kind)
    for key in keys.keys_of(kind):
        assert key.description, f"{key.dotted} has no description"
        assert "--" + key.dotted.replace("*", "NAME") in text
        assert key.description in text
        assert key.required or key.default is not msgspec.NODEFAULT
    assert "[whole number from 1 to 64; default: 4]" in text or kind is RouterConfig


@pytest.mark.parametrize("kind", [SiteConfig, RouterConfig])
def test_names_with_a_unit_say_it_in_words(kind: type[msgspec.Struct]) -> None:
    words = {"_s": "econds", "_ms": "illiseconds", "_bytes": "ytes", "_gbps": "Gbit/s", "_tokens": "tokens"}
    for key in keys.keys_of(kind):
        for suffix, word in words.items():
            if key.path[-1].endswith(suffix) and not key.path[-1].endswith("_bits"):
                assert word in key.description or "window" in key.description.lower(), key.dotted


SCALARS = st.one_of(
    st.integers(1, 64).map(lambda n: ("transport.connections", n)),
    st.floats(0.001, 1e6).map(lambda x: ("limits.stop_timeout_s", x)),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])).map(lambda s: ("transport.bind_host", s)),
    st.lists(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=1)).map(
        lambda args: ("site.log_dir", " ".join(args))
    ),
)


@given(SCALARS)
def test_a_flag_means_what_the_same_value_means_in_a_file(pair: tuple[str, Any]) -> None:
    path, value = pair
    section, key = path.split(".")
    in_file = tomllib.loads(f"[{section}]\n{key} = {keys.toml_value(value)}")
    by_flag, paths = flags.apply({}, SiteConfig, [flags.Override(path, str(value))])
    assert by_flag == in_file
    assert paths == {(section, key)}
