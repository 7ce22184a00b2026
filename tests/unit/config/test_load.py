"""Reading files: what is wrong, where, and what to write instead."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.flags import Override
from sglang_prfaas.config.load import kind_of, load_router, load_site
from sglang_prfaas.errors import ConfigError
from tests.unit.config.conftest import PD, PRFAAS, ROUTER, WriteToml


def problems_of(write: WriteToml, text: str, kind: str = "site") -> list[str]:
    """The messages about a file, without its name."""
    path = write("file.toml", text)
    with pytest.raises(ConfigError) as caught:
        load_site(path) if kind == "site" else load_router(path)
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


def test_a_right_file_loads_with_the_defaults_of_the_schema(write: WriteToml) -> None:
    config = load_site(write("pd.toml", PD))
    assert [server.name for server in config.servers] == ["prefill-0", "decode-0"]
    assert config.transport.connections == 4
    assert load_router(write("router.toml", ROUTER)).policy.threshold_tokens == 2000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('role = "pd"', 'rol = "pd"', "site.rol: unknown key; did you mean site.role?"),
        ('role = "pd"', 'role = "pdd"', 'site.role: expected one of "pd", "prfaas", got "pdd"; did you mean "pd"?'),
        ("[agent]", "[agents]", "agents: unknown key; did you mean agent?"),
        (
            'name = "pd"',
            'name = "pd"\nconnections = 8',
            "site.connections: unknown key; did you mean transport.connections?",
        ),
        (
            "port = 30001",
            'port = "30001"',
            'servers.decode-0.port: expected a whole number from 1 to 65535, got "30001"; '
            "write for example port = 30000",
        ),
        ("port = 30001\n", "", "servers.decode-0.port: missing; write port = 30000 (HTTP port of the SGLang server)"),
        (
            'name = "decode-0"\n',
            "",
            'servers.1.name: missing; write name = "..." (Name of the server, unique in its site)',
        ),
        (
            'model = "owner/model"',
            'model = ""',
            'site.model: expected a string that is not empty, got ""; write for example model = "..."',
        ),
        (
            'model = "owner/model"',
            'model = "owner/model"\nargs = "--tp 2"',
            'site.args: expected a list of strings, such as ["--mem-fraction-static", "0.8"], got "--tp 2"; '
            "write for example args = []",
        ),
        (
            'model = "owner/model"',
            'model = "owner/model"\nenv = { OMP_NUM_THREADS = 1 }',
            'site.env.OMP_NUM_THREADS: expected a string, got 1; write OMP_NUM_THREADS = "1"',
        ),
        (
            "[agent]",
            "[transport]\nconnections = 0\n[agent]",
            "transport.connections: expected a whole number from 1 to 64, got 0; "
            "write for example connections = 4 (the default)",
        ),
        (
            "[agent]\nport = 9000",
            "[[agent]]\nport = 9000",
            "agent: expected a table, got [{ port = 9000 }]; write [agent] and its keys below",
        ),
    ],
)
def test_one_mistake_gives_one_message(write: WriteToml, old: str, new: str, message: str) -> None:
    assert old in PD
    assert problems_of(write, PD.replace(old, new, 1)) == [message]


def test_a_negative_threshold_says_what_to_write(write: WriteToml) -> None:
    text = ROUTER.replace("threshold_tokens = 2000", "threshold_tokens = -1")
    assert problems_of(write, text, "router") == [
        "policy.threshold_tokens: expected a whole number of at least 0, got -1; "
        "write for example threshold_tokens = 19400 (the default)"
    ]


def test_every_mistake_is_reported(write: WriteToml) -> None:
    text = PD.replace('role = "pd"', "").replace("port = 30001", "port = 0").replace("[agent]", "[agnt]")
    assert [problem.split(":")[0] for problem in problems_of(write, text)] == [
        "agnt",
        "site.role",
        "servers.decode-0.port",
    ]


def test_a_file_without_tables_says_which_are_needed(write: WriteToml) -> None:
    assert problems_of(write, "") == [
        "site: missing; add a table [site] with name, role, model",
        "servers: missing; add at least one [[servers]] (The SGLang servers)",
    ]


def test_broken_toml_says_where(write: WriteToml) -> None:
    (problem,) = problems_of(write, "[site]\nname = \nrole = 1")
    assert problem.startswith("not valid TOML: ")
    assert "line 2" in problem


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^absent\.toml: cannot be read: No such file or directory$"):
        load_site("absent.toml")


def test_kinds_of_files(write: WriteToml) -> None:
    assert kind_of(write("pd.toml", PD)) == "site"
    assert kind_of(write("prfaas.toml", PRFAAS)) == "site"
    assert kind_of(write("router.toml", ROUTER)) == "router"
    with pytest.raises(ConfigError, match="neither a site nor a router"):
        kind_of(write("other.toml", "[policy]\n"))


def test_the_file_of_the_other_kind_is_one_message(write: WriteToml) -> None:
    assert problems_of(write, ROUTER) == ["describes a router, start it with `launch router`; expected a site"]
    assert problems_of(write, PD, "router") == ["describes a site, start it with `launch site`; expected a router"]


def test_a_wrong_flag_is_named_as_a_flag(write: WriteToml) -> None:
    with pytest.raises(ConfigError) as caught:
        load_site(write("pd.toml", PD), [Override("servers.decode-0.port", "http")])
    assert caught.value.problems == [
        '--servers.decode-0.port: expected a whole number from 1 to 65535, got "http"; write for example port = 30000'
    ]
