"""Making keys, reading them, and what is said of those that do not fit."""

from __future__ import annotations

import datetime
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.transport.security import key_files, make
from sglang_prfaas.transport.security.key_files import load_keys
from sglang_prfaas.transport.security.peers import PeerList, Watch, read_peers
from tests.unit.transport.security.conftest import NOW


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_keys_that_were_made_fit(keys: Path) -> None:
    for site in ("pd", "prfaas"):
        loaded = load_keys(keys / site)
        assert loaded.site == site
        assert set(loaded.peers.current()) == {"pd", "prfaas"}
        assert key_files.warnings(loaded, NOW.timestamp()) == []
        assert abs(loaded.expires_unix_s - NOW.timestamp() - make.DEFAULT_DAYS * 86400) < 2
    assert read_peers(keys / "peers.toml")["pd"].addresses == ("10.2.0.0/24", "pd.example.org")


def test_secrets_are_their_owners_only(keys: Path) -> None:
    secrets = list(keys.rglob("*.key"))
    assert len(secrets) == 5
    for path in secrets:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for directory in (keys, keys / "pd", keys / "prfaas"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert not (keys / "pd" / "ca.key").exists()


def test_making_them_again_changes_nothing(keys: Path) -> None:
    before = contents(keys)
    done = make.make_keys(keys, {"pd": (), "prfaas": ()}, now=NOW)
    assert done == [f"site pd has its keys in {keys}/pd", f"site prfaas has its keys in {keys}/prfaas"]
    assert contents(keys) == before


def test_a_site_is_added_and_all_learn_of_it(keys: Path) -> None:
    before = contents(keys)
    make.make_keys(keys, {"third": ("10.3.0.1",)}, now=NOW)
    for path, data in before.items():
        assert path.endswith("peers.toml") or Path(path).read_bytes() == data
    for site in ("pd", "prfaas", "third"):
        assert set(load_keys(keys / site).peers.current()) == {"pd", "prfaas", "third"}


def test_an_edited_address_reaches_every_copy(keys: Path) -> None:
    master = keys / "peers.toml"
    master.write_text(master.read_text().replace("10.2.0.0/24", "10.9.0.0/16"))
    make.make_keys(keys, {}, now=NOW)
    assert load_keys(keys / "prfaas").peers.current()["pd"].is_at("10.9.1.2")


def test_keys_are_exchanged_in_two_steps(keys: Path) -> None:
    old = load_keys(keys / "pd")
    make.roll(keys, "pd", now=NOW)
    new = load_keys(keys / "pd")
    assert new.curve_public != old.curve_public
    listed = load_keys(keys / "prfaas").peers.current()["pd"]
    assert listed.curve == (new.curve_public.decode(), old.curve_public.decode())
    assert len(listed.certificates) == 2
    with pytest.raises(ConfigError, match="an exchange is under way; end it with --retire pd"):
        make.roll(keys, "pd", now=NOW)
    make.retire(keys, "pd")
    assert load_keys(keys / "prfaas").peers.current()["pd"].curve == (new.curve_public.decode(),)
    with pytest.raises(ConfigError, match="nothing to retire"):
        make.retire(keys, "pd")
    with pytest.raises(ConfigError, match="there is no site other"):
        make.roll(keys, "other", now=NOW)


@pytest.mark.parametrize("site", ["", "a/b", "..", ".x", "ca.crt", "a" * 65, "pd\n"])
def test_names_that_are_none(tmp_path: Path, site: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a site"):
        make.make_keys(tmp_path / "keys", {site: ()}, now=NOW)


@pytest.mark.parametrize("gone", ["ca.crt", "ca.key", "pd/site.crt", "pd/site.key", "pd/curve.key"])
def test_half_of_the_files_is_not_made_up_for(keys: Path, gone: str) -> None:
    (keys / gone).unlink()
    before = contents(keys)
    with pytest.raises(ConfigError, match="restore"):
        make.make_keys(keys, {"pd": ()}, now=NOW)
    assert contents(keys) == before


def swap(keys: Path, name: str) -> None:
    """Put the other site's file in place of pd's."""
    (keys / "pd" / name).write_bytes((keys / "prfaas" / name).read_bytes())


def replace(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda keys: (keys / "pd" / "curve.key").unlink(), r"pd: no file curve\.key; make keys with"),
        (lambda keys: swap(keys, "site.key"), "do not fit together: key values mismatch"),
        (lambda keys: swap(keys, "site.crt"), "do not fit together: key values mismatch"),
        (lambda keys: swap(keys, "curve.key"), r"peers\.toml does not have site\.crt under prfaas: sha256:"),
        (lambda keys: (keys / "pd" / "site.key").write_text("x"), "do not fit together"),
        (lambda keys: (keys / "pd" / "curve.key").write_text("x"), "1 characters, expected a CURVE secret key of 40"),
        (lambda keys: (keys / "pd" / "curve.key").write_text("~" * 40), "no CURVE secret key in Z85"),
        (lambda keys: replace(keys / "pd" / "peers.toml", "[", "{"), r"pd/peers\.toml: "),
        (lambda keys: replace(keys / "pd" / "peers.toml", "curve", "curves"), "unknown field `curves`"),
        (lambda keys: replace(keys / "pd" / "peers.toml", "sha256:", "sha1:"), "certificates"),
        (lambda keys: (keys / "pd" / "peers.toml").write_text(""), r"peers\.toml has no site with the public key"),
    ],
)
def test_files_that_do_not_fit(keys: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(keys)
    with pytest.raises(ConfigError, match=message):
        load_keys(keys / "pd")


def test_an_expired_certificate_and_one_that_soon_will_be(tmp_path: Path) -> None:
    make.make_keys(tmp_path / "soon", {"pd": ()}, days=10, now=NOW)
    (text,) = key_files.warnings(load_keys(tmp_path / "soon" / "pd"), NOW.timestamp())
    assert "site.crt expires in 10.0 days; make a new one: launch keys DIR --roll pd" in text
    with pytest.raises(ConfigError, match="certificate has expired"):
        make.make_keys(tmp_path / "late", {"pd": ()}, days=1, now=NOW - datetime.timedelta(days=3))


def test_secrets_that_others_can_read(keys: Path) -> None:
    os.chmod(keys / "pd" / "site.key", 0o640)
    (text,) = key_files.warnings(load_keys(keys / "pd"), NOW.timestamp())
    assert text == f"{keys}/pd/site.key can be read by others (mode 0640); run chmod 600 on it"


def test_a_key_under_two_sites(keys: Path) -> None:
    path = keys / "peers.toml"
    key = read_peers(path)["pd"].curve[0]
    path.write_text(path.read_text() + f"\n[thief]\ncurve = [{key!r}]\n")
    with pytest.raises(ConfigError, match="stands under pd and thief; a key proves one site"):
        read_peers(path)


def test_addresses(keys: Path) -> None:
    pd = PeerList(keys / "peers.toml").current()["pd"]
    assert pd.is_at("10.2.0.255")
    assert pd.is_at("pd.example.org")
    for host in ("10.2.1.0", "fd00::1", "example.org", ""):
        assert not pd.is_at(host)


def test_a_change_counts_once_it_has_settled(tmp_path: Path) -> None:
    path = tmp_path / "peers.toml"
    whole = f'[pd]\ncurve = ["{"a" * 40}"]\n[third]\ncurve = ["{"b" * 40}"]\n'
    path.write_text(whole)
    watch = Watch(PeerList(path))
    assert not watch.changed()
    path.write_text("")
    assert not watch.changed(), "it may be being written"
    path.write_text(whole)
    assert not any(watch.changed() and not watch.has_key("pd", "a" * 40) for _ in range(5))
    path.write_text(whole.partition("[third]")[0])
    assert [watch.changed() for _ in range(4)] == [False, True, False, False]
    assert watch.has_key("pd", "a" * 40)
    assert not watch.has_key("third", "b" * 40)
    assert not watch.has_certificate("pd", "sha256:0")


def test_without_keys_nothing_changes() -> None:
    watch = Watch(None)
    assert not watch.changed()
    assert watch.has_key("", "")
