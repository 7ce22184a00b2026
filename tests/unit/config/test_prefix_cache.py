"""Rules of `[prefix_cache]`."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.checks import Finding, site_findings
from sglang_prfaas.config.load import load_site
from tests.unit.config.conftest import PD, WriteToml

LOCAL = 'backend = "local"\ndisk_dir = "/var/cache/prfaas"\n'
MOONCAKE = 'backend = "mooncake"\nmooncake_master = "10.0.0.1:50051"\n'


def findings(write: WriteToml, section: str, args: str = "[]") -> list[Finding]:
    text = PD.replace("port = 30000\n", f"port = 30000\nargs = {args}\n") + f"[prefix_cache]\n{section}"
    return site_findings(load_site(write("site.toml", text), check=False))


@pytest.mark.parametrize("section", ["", LOCAL, MOONCAKE])
def test_right_sections_have_no_findings(write: WriteToml, section: str) -> None:
    assert findings(write, section) == []


@pytest.mark.parametrize(
    ("section", "key", "text", "fatal"),
    [
        ('backend = "local"\n', "disk_dir", "needs a directory", True),
        (LOCAL + 'mooncake_master = "a:1"\n', "mooncake_master", "not used", False),
        ('backend = "mooncake"\n', "mooncake_master", "as \"HOST:PORT\", got ''", True),
        ('backend = "mooncake"\nmooncake_master = "host"\n', "mooncake_master", "got 'host'", True),
        (MOONCAKE + 'disk_dir = "/x"\n', "disk_dir", "not used", False),
        ('disk_dir = "/x"\n', "disk_dir", 'write backend = "local"', False),
    ],
)
def test_what_a_backend_needs(write: WriteToml, section: str, key: str, text: str, fatal: bool) -> None:
    (finding,) = findings(write, section)
    assert finding.path == f"prefix_cache.{key}"
    assert text in finding.text
    assert finding.fatal == fatal


@pytest.mark.parametrize("flag", ["--enable-hierarchical-cache", "--disable-radix-cache"])
def test_arguments_that_contradict(write: WriteToml, flag: str) -> None:
    (finding,) = findings(write, LOCAL, f'["{flag}"]')
    assert finding.path == "servers.prefill-0.args"
    assert flag in finding.text
    assert finding.fatal
    assert findings(write, "", f'["{flag}"]') == []
