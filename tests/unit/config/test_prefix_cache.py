"""Rules of `[prefix_cache]`."""

from __future__ import annotations

import pytest

from sglang_prfaas.config.checks import Finding, site_findings
from sglang_prfaas.config.load import load_site
from sglang_prfaas.config.prefix_cache import with_links
from sglang_prfaas.config.schema import CachePeerConfig, LinkConfig, PrefixCacheConfig
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


SERVED = LOCAL + "serve_port = 9100\n"
PEER = (
    LOCAL + "prefill_tokens_per_s = 20000.0\n[[prefix_cache.peers]]\nname = 'other'\nhost = '127.0.0.1'\nport = 9100\n"
)


def of_keys(text: str, keys_dir: str = "", security: str = "auto") -> str:
    return f'{text}[transport]\nkeys_dir = "{keys_dir}"\nsecurity = "{security}"\n'


def test_a_cache_that_is_served_and_peers(write: WriteToml) -> None:
    assert findings(write, SERVED) == []
    assert findings(write, PEER) == []


@pytest.mark.parametrize(
    ("section", "path", "text", "fatal"),
    [
        (MOONCAKE + "serve_port = 9100\n", "prefix_cache.serve_port", "only disk_dir is served", True),
        (SERVED.replace("9100", "9000"), "prefix_cache.serve_port", "wants port 9000, which the agent has", True),
        (SERVED + 'serve_host = "10.0.0.1"\n', "transport.keys_dir", "cached prefixes are served on 10.0.0.1", True),
        (
            of_keys(SERVED + 'serve_host = "10.0.0.1"\n', security="off"),
            "prefix_cache.serve_port",
            "to whoever reaches it",
            False,
        ),
        (of_keys(SERVED, "/keys"), "prefix_cache.serve_to", "no other site may read", False),
        (PEER.replace("prefill_tokens_per_s = 20000.0\n", ""), "prefix_cache.prefill_tokens_per_s", "20000.0", True),
        (PEER.replace("127.0.0.1", "10.0.0.1"), "prefix_cache.peers.other.host", "without keys", True),
        (PEER.replace("'other'", "'pd'"), "prefix_cache.peers.pd.name", "the site itself", True),
        (PEER + PEER[PEER.index("[[") :], "prefix_cache.peers", "2 peers are named 'other'", True),
        ("serve_port = 9100\n", "prefix_cache.serve_port", 'write backend = "local"', False),
        (PEER.replace(LOCAL, ""), "prefix_cache.peers", "not used", False),
    ],
)
def test_what_serving_and_fetching_need(write: WriteToml, section: str, path: str, text: str, fatal: bool) -> None:
    (finding,) = findings(write, section)
    assert finding.path == path
    assert text in finding.text
    assert finding.fatal == fatal


@pytest.mark.parametrize(
    ("keys", "path", "text", "fatal"),
    [
        ("host_bytes = 1024\nprefix_floor = 0.7\ntransfer_floor = 0.4\n", "transfer_floor", "their sum is 1", True),
        ("transfer_floor = 0.4\n", "transfer_floor", "is a share of host_bytes, which is 0", False),
        ("host_bytes = 1024\nprefix_floor = 0.4\n", "prefix_floor", "not used with transfer_floor = 0", False),
    ],
)
def test_floors(write: WriteToml, keys: str, path: str, text: str, fatal: bool) -> None:
    (finding,) = findings(write, LOCAL + keys)
    assert (finding.path, finding.fatal) == (f"prefix_cache.{path}", fatal)
    assert text in finding.text


def test_peers_take_what_links_say() -> None:
    peers = [CachePeerConfig(name=name, host="h", port=1) for name in ("a", "b")]
    peers.append(CachePeerConfig(name="c", host="h", port=1, capacity_gbps=5.0, rtt_ms=7.0))
    links = [LinkConfig(to_site="a", capacity_gbps=10.0, rtt_ms=30.0), LinkConfig(to_site="c", capacity_gbps=1.0)]
    found = with_links(PrefixCacheConfig(peers=peers), links).peers
    assert [(peer.capacity_gbps, peer.rtt_ms) for peer in found] == [(10.0, 30.0), (1.0, 0.0), (5.0, 7.0)]
