"""The command line: exit status, messages, help."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from jsonschema import Draft202012Validator, ValidationError  # type: ignore[import-untyped]

from sglang_prfaas.config import load
from sglang_prfaas.launch.__main__ import COMMANDS, main
from sglang_prfaas.launch.schema import json_schema
from tests.unit.config.conftest import PD, PRFAAS, ROUTER

EXAMPLES = sorted((Path(__file__).parents[3] / "launch" / "datacenters").glob("*.toml"))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """A right deployment: pd.toml, prfaas.toml, router.toml."""
    paths = []
    for name, text in (("pd.toml", PD), ("prfaas.toml", PRFAAS), ("router.toml", ROUTER)):
        (tmp_path / name).write_text(text)
        paths.append(str(tmp_path / name))
    return paths


def test_check_prints_what_would_run(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *files]) == 0
    out, err = capsys.readouterr()
    assert err == "3 of 3 files are right\n"
    command = (
        f"{sys.executable} -m sglang.launch_server --model-path owner/model --host 127.0.0.1 --port 30000 "
        "--disaggregation-mode prefill --disaggregation-transfer-backend prfaas "
        "--uvicorn-access-log-exclude-prefixes /v1/loads --disaggregation-bootstrap-port 8998"
    )
    assert f"\n    {command}\n" in out
    assert "PRFAAS_CONNECTIONS=4" in out
    assert "PRFAAS_MOVER_PORT=31000" in out
    assert "\n  for other sites: TCP 8998, 9000, 31000-31001; SGLang's own ports stay inside\n" in out
    assert "PRFAAS_SITE=prfaas" in out
    assert "site prfaas (prfaas): servers listed by its agent http://127.0.0.1:9010" in out


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("pd.toml", "[agent]", "[agnt]", "agnt: unknown key; did you mean agent?"),
        (
            "pd.toml",
            "port = 30001",
            "port = 30000",
            "servers.decode-0.port: server decode-0 wants port 30000, which server prefill-0 has "
            "(servers.prefill-0.port); choose another port",
        ),
        (
            "pd.toml",
            '[[servers]]\nname = "decode-0"\nrole = "decode"\nport = 30001\n',
            "",
            'servers: a pd site needs a decode server; add [[servers]] with role = "decode", '
            'or write site.role = "prfaas" for a site that only prefills',
        ),
        (
            "router.toml",
            "threshold_tokens = 2000",
            "threshold_tokens = -5",
            "policy.threshold_tokens: expected a whole number of at least 0, got -5; "
            "write for example threshold_tokens = 19400 (the default)",
        ),
    ],
)
@pytest.mark.parametrize("command", ["check", "start"])
def test_a_wrong_file_gives_one_message_and_status_2(
    files: list[str], capsys: pytest.CaptureFixture[str], command: str, file: str, old: str, new: str, message: str
) -> None:
    path = next(path for path in files if path.endswith(file))
    text = Path(path).read_text()
    assert old in text
    Path(path).write_text(text.replace(old, new))
    if command == "start":
        command = "router" if file == "router.toml" else "site"
    assert main([command, path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {path}: {message}\n"


def test_check_reports_every_file(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for path in files[:2]:
        Path(path).write_text(Path(path).read_text().replace("[agent]", "[agnt]"))
    assert main(["check", *files]) == 2
    assert capsys.readouterr().err.count("unknown key") == 2


def test_check_across_files(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(files[1]).write_text(PRFAAS.replace("port = 30010", "port = 30000"))
    assert main(["check", *files]) == 2
    assert f"which server prefill-0 of {files[0]} has" in capsys.readouterr().err


def test_check_with_flags(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", files[0], "--servers.decode-0.port=30007"]) == 0
    assert "--port 30007" in capsys.readouterr().out
    assert main(["check", *files, "--servers.decode-0.port=30007"]) == 2
    assert "apply to one file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["site", "--site.nme", "x"], ["router", "--policy.threshold_tokens=-1"], ["nothing"], []]
)
def test_a_wrong_command_line_is_status_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sys.exit(main(argv))
    assert caught.value.code == 2


@pytest.mark.parametrize("kind", ["site", "router", None])
def test_schemas_are_valid_and_accept_the_examples(kind: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", *([kind] if kind else [])]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json_schema(kind)
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for path in EXAMPLES:
        if kind in (None, load.kind_of(path)):
            validator.validate(load.read_toml(path))
    with pytest.raises(ValidationError):
        validator.validate({"site": {"name": "x"}, "unknown": 1})


def test_the_examples_are_right(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(EXAMPLES) == 3
    assert main(["check", *map(str, EXAMPLES)]) == 0
    *warnings, last = capsys.readouterr().err.splitlines()
    assert last == "3 of 3 files are right"
    assert all("/etc/sglang-prfaas/keys on this machine" in warning for warning in warnings), warnings


@pytest.mark.parametrize("command", ["site", "router", "check"])
def test_help_lists_every_key(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    wanted = {
        "site": ["--transport.connections N", "--servers.NAME.port N", "--limits.stop_timeout_s X"],
        "router": ["--policy.threshold_tokens N", "--sites.NAME.agent_url TEXT"],
        "check": ["--transport.connections N", "--policy.threshold_tokens N"],
    }[command]
    for key in wanted:
        assert key in text
    assert "exit status" in text


def test_every_command_and_every_document_can_be_found() -> None:
    """The launcher's document has each command, and links lead from the README to each document."""
    root = Path(__file__).parents[3]
    launcher = (root / "docs" / "launcher.md").read_text()
    assert [command for command in COMMANDS if f"sglang_prfaas.launch {command}" not in launcher] == []
    found, waiting = {root / "README.md"}, [root / "README.md"]
    while waiting:
        document = waiting.pop()
        links = re.findall(r"\]\(([^)\s#:]+\.md)", document.read_text())
        new = {(document.parent / link).resolve() for link in links} - found
        found |= new
        waiting += new
    assert set((root / "docs").rglob("*.md")) <= found


def test_top_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['launch', '--help']\n"
        "from sglang_prfaas.launch.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'sglang', 'zmq', 'transformers', 'asyncio', 'httptools'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in COMMANDS:
        assert name in result.stdout


def test_site_configurations_survive_encoding(files: list[str]) -> None:
    config = load.load_site(files[0])
    assert msgspec.json.decode(msgspec.json.encode(config), type=type(config)) == config
