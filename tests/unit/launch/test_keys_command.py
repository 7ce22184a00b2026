"""`launch keys`, and what `launch check` and `launch site` say of keys."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_prfaas.launch.__main__ import main
from tests.unit.config.conftest import PD, PRFAAS, ROUTER


@pytest.fixture
def keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main(["keys", str(tmp_path / "keys"), "--site", "pd=10.2.0.1,10.2.0.2", "--site", "prfaas"]) == 0
    capsys.readouterr()
    return tmp_path / "keys"


def site_files(tmp_path: Path, keys: Path, pd: str = "pd", prfaas: str = "prfaas") -> list[str]:
    found = []
    for name, text, site in (("pd.toml", PD, pd), ("prfaas.toml", PRFAAS, prfaas)):
        path = tmp_path / name
        path.write_text(text.replace("[agent]", f'[transport]\nkeys_dir = "{keys / site}"\n\n[agent]'))
        found.append(str(path))
    return found


def test_keys_are_made_listed_exchanged(keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 'addresses = ["10.2.0.1","10.2.0.2"]' in (keys / "prfaas" / "peers.toml").read_text()
    assert main(["keys", str(keys)]) == 0
    assert capsys.readouterr().out == f"{keys}: nothing to do\n"
    assert main(["keys", str(keys), "--roll", "pd", "--days", "30"]) == 0
    assert "the certificate holds for 30 days" in capsys.readouterr().out
    assert main(["keys", str(keys), "--retire", "pd"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--site", "a/b"], "error: 'a/b' cannot name a site"),
        (["--site", "x", "--days", "0"], "error: --days: expected at least 1, got 0"),
        (["--site", "x", "--roll", "pd"], "error: --site makes keys, --roll and --retire exchange them"),
        (["--roll", "nobody"], "there is no site nobody"),
        (["--retire", "pd"], "there is nothing to retire"),
    ],
)
def test_what_cannot_be_done(
    keys: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["keys", str(keys), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["keys", str(tmp_path / "file"), "--site", "pd"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/file: File exists\n"


def test_check_is_content_with_keys_that_fit(tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--quiet", *site_files(tmp_path, keys)]) == 0
    assert capsys.readouterr().err == "2 of 2 files are right\n"


def test_check_finds_keys_of_another_site(tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--quiet", *site_files(tmp_path, keys, pd="prfaas")]) == 2
    expected = f"transport.keys_dir: {keys}/prfaas holds the keys of site prfaas; this is site pd\n"
    assert capsys.readouterr().err.endswith(expected)


def test_check_finds_sites_that_do_not_know_each_other(
    tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peers = keys / "pd" / "peers.toml"
    peers.write_text(peers.read_text().partition('["prfaas"]')[0])
    assert main(["check", "--quiet", *site_files(tmp_path, keys)]) == 2
    assert f"{peers} does not let site prfaas in with the key in {keys}/prfaas" in capsys.readouterr().err


def test_check_warns_of_secrets_others_can_read(tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (keys / "pd" / "curve.key").chmod(0o644)
    assert main(["check", "--quiet", *site_files(tmp_path, keys)]) == 0
    assert "curve.key can be read by others (mode 0644); run chmod 600 on it" in capsys.readouterr().err


def test_check_looks_at_the_keys_of_a_router(tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "router.toml"
    text = ROUTER.replace("http://127.0.0.1:9010", "https://127.0.0.1:9010")
    file.write_text(f'{text}\n[reports]\nkeys_dir = "{keys / "pd"}"\n')
    assert main(["check", "--quiet", str(file)]) == 0
    peers = keys / "pd" / "peers.toml"
    peers.write_text(peers.read_text().partition('["prfaas"]')[0])
    assert main(["check", "--quiet", str(file)]) == 2
    assert f"reports.keys_dir: {peers} has no site prfaas, which [[sites]] names" in capsys.readouterr().err
    (keys / "pd" / "site.key").unlink()
    assert main(["check", "--quiet", str(file)]) == 2
    assert "reports.keys_dir: " + str(keys / "pd") + ": no file site.key" in capsys.readouterr().err
    file.write_text(f'{text}\n[reports]\nkeys_dir = "{tmp_path / "elsewhere"}"\n')
    assert main(["check", "--quiet", str(file)]) == 0
    assert "the keys of the router were not checked" in capsys.readouterr().err


def test_places_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", str(tmp_path / "keys"), "--site", "pd=10.2.0.0/99,10.2.0.256"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: --site pd: '10.2.0.0/99' is no network")
    assert second.startswith("error: --site pd: '10.2.0.256' is neither an address nor a name")
    assert not (tmp_path / "keys").exists()


def test_keys_of_another_machine(tmp_path: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = site_files(tmp_path, keys, prfaas="elsewhere")
    assert main(["check", "--quiet", *files]) == 0
    assert "the keys of site prfaas were not checked" in capsys.readouterr().err
    assert main(["site", files[1]]) == 2
    assert "no file ca.crt, site.crt, site.key, curve.key, peers.toml; make keys with" in capsys.readouterr().err
