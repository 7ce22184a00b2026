"""The agent over real sockets, in front of fake servers."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.clock import Deadline, MonotonicClock
from sglang_prfaas.config.schema import LinkConfig, PrefixCacheConfig, SiteRole, TransportConfig
from sglang_prfaas.site import Site, running
from sglang_prfaas.site.free_ports import HeldPort
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.progress import Progress, silent
from sglang_prfaas.site.threaded import RunningSite
from sglang_prfaas.store.disk import DiskStore
from sglang_prfaas.store.stats import Counters, PeerStats, StatsFile, StatsWriter
from sglang_prfaas.transport.object_client import ObjectClient
from sglang_prfaas.transport.security import PLAIN
from tests.unit.site.conftest import LIMITS, PATIENCE_S, MakeSite, ask_agent, changed, wait_until


@contextmanager
def site_with_agent(
    make_site: MakeSite, python: str, role: SiteRole, links: list[LinkConfig] | None = None
) -> Iterator[RunningSite]:
    roles = ("prefill",) if role == "prfaas" else ("prefill", "decode")
    config = make_site("here", role, roles, changed(LIMITS, restart_backoff_s=PATIENCE_S), agent=True)
    config = msgspec.structs.replace(config, links=links or [])
    with running(Site(config, python=python, progress=Progress(write=silent))) as sites:
        yield sites["here"]


def ask(site: RunningSite, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
    return ask_agent(site.agent_url, method, target, body)


def test_the_site_is_described(make_site: MakeSite, fake_python: str) -> None:
    with site_with_agent(make_site, fake_python, "pd") as site:
        status, body = ask(site, "GET", "/site")
        assert status == 200
        report = json.loads(body)
        prefill, decode = report["servers"]
        assert (report["name"], report["role"], report["served_model_name"]) == ("here", "pd", "owner/model")
        assert prefill == {
            "name": "prefill_0",
            "role": "prefill",
            "state": "ready",
            "path": "/servers/prefill_0",
            "bootstrap_host": "127.0.0.1",
            "bootstrap_port": site.server("prefill_0").command.bootstrap_port,
            "restarts": 0,
            "change": "",
            "adapter_ids": {},
        }
        assert decode["bootstrap_port"] == 0
        assert report["configured_links"] == []


def test_the_site_tells_what_its_file_says_of_links(make_site: MakeSite, fake_python: str) -> None:
    links = [LinkConfig(to_site="elsewhere", capacity_gbps=10, rtt_ms=5)]
    with site_with_agent(make_site, fake_python, "prfaas", links) as site:
        report = json.loads(ask(site, "GET", "/site")[1])
    assert report["configured_links"] == [{"to_site": "elsewhere", "capacity_gbps": 10.0, "rtt_ms": 5.0}]


def test_health_and_metrics_follow_the_servers(make_site: MakeSite, fake_python: str) -> None:
    with site_with_agent(make_site, fake_python, "prfaas") as site:
        assert ask(site, "GET", "/health")[0] == 200
        line = 'prfaas_server_state{site="here",server="prefill_0",role="prefill",state="%s"} 1'
        assert line % "ready" in ask(site, "GET", "/metrics")[1].decode()
        site.kill("prefill_0")
        wait_until(lambda: site.server("prefill_0").state is State.RESTARTING, "the death to be noticed")
        assert ask(site, "GET", "/health")[0] == 503
        assert line % "restarting" in ask(site, "GET", "/metrics")[1].decode()
        status, body = ask(site, "POST", "/servers/prefill_0/generate", b"{}")
        assert status == 503
        assert json.loads(body)["error"]["message"] == "Server prefill_0 is restarting."


def test_bytes_are_relayed_as_they_are(make_site: MakeSite, fake_python: str) -> None:
    with site_with_agent(make_site, fake_python, "pd") as site:
        assert ask(site, "GET", "/servers/decode_1/a%20b?c=%2F") == (200, b"decode_1 /a%20b?c=%2F")
        body = bytes(range(256)) * 4096
        assert ask(site, "POST", "/servers/prefill_0/generate", body) == (200, body)
        assert ask(site, "GET", "/servers/nobody/health")[0] == 404
        assert ask(site, "GET", "/elsewhere")[0] == 404
        assert ask(site, "POST", "/site", b"")[0] == 405


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/generate", 200),
        ("POST", "/v1/chat/completions", 200),
        ("GET", "/health", 200),
        ("GET", "/server_info", 403),
        ("GET", "/v1/models?x=1", 200),
        ("POST", "/flush_cache", 403),
        ("GET", "/flush_cache", 403),
        ("POST", "/pd_role_switch", 403),
        ("POST", "/update_weights_from_disk", 403),
        ("GET", "/generate", 403),
        ("POST", "/v1/../flush_cache", 403),
        ("POST", "/generate/../flush_cache", 403),
        ("POST", "/%66lush_cache", 403),
        ("POST", "//generate", 403),
        ("POST", "/Generate", 403),
    ],
)
def test_a_prfaas_site_relays_no_administration(prfaas: RunningSite, method: str, path: str, status: int) -> None:
    assert ask(prfaas, method, "/servers/prefill_0" + path, b"" if method == "POST" else None)[0] == status


@pytest.fixture
def prfaas(make_site: MakeSite, fake_python: str) -> Iterator[RunningSite]:
    with site_with_agent(make_site, fake_python, "prfaas") as site:
        yield site


def test_requests_end_before_a_site_stops(make_site: MakeSite, fake_python: str) -> None:
    """A stopping site relays nothing new; what is under way at a server that ends late is finished."""
    config = make_site("here", "prfaas", ("prefill",), agent=True)
    site = Site(config, python=fake_python, progress=Progress(write=silent))
    with running(site, drain=True) as sites:
        site.agent.draining = True
        status, body = ask(sites["here"], "POST", "/servers/prefill_0/generate", b"{}")
        assert status == 503
        assert json.loads(body)["error"]["code"] == "draining"
        (server,) = json.loads(ask(sites["here"], "GET", "/site")[1])["servers"]
        assert server["state"] == "stopping"
    assert site.servers["prefill_0"].exit_code == -signal.SIGTERM or site.servers["prefill_0"].exit_code == 0


def test_the_prefix_cache_is_served_and_counted(make_site: MakeSite, fake_python: str, tmp_path: Path) -> None:
    counters = Counters()
    store = DiskStore(tmp_path / "cache", 1 << 20, counters)
    store.write("d/kv/00", memoryview(b"page"))
    counters.add(host_hits=2, backend_hits=3, host_read_bytes=128, misses=1, fetches=4, fetch_saved_s=0.5)
    content = StatsFile(
        name="here-prefill_0",
        backend="local",
        pid=1,
        host_limit_bytes=256,
        backend_limit_bytes=1 << 20,
        host_used_bytes=64,
        backend_used_bytes=4096,
        counters=counters.snapshot(),
        peers=(PeerStats(site="there", bytes_per_s=1e6, rtt_s=0.02),),
    )
    StatsWriter(tmp_path / "cache" / "stats" / "here-prefill_0.json", lambda: content).close()
    config = make_site("here", "pd", ("prefill", "decode"), agent=True)
    held = HeldPort()
    cache = PrefixCacheConfig(backend="local", disk_dir=str(tmp_path / "cache"), serve_port=held.port)
    held.release()
    transport = TransportConfig()
    with running(
        Site(msgspec.structs.replace(config, prefix_cache=cache), python=fake_python, progress=Progress(write=silent))
    ) as sites:
        client = ObjectClient("here", "127.0.0.1", cache.serve_port, transport, PLAIN)
        deadline = Deadline(MonotonicClock(), PATIENCE_S)
        frames: list[bytes] = []
        groups = (("d/kv", ("00",)),)
        sizes = client.ask(groups, deadline)
        assert client.get(groups, sizes, lambda name, frame: frames.append(bytes(frame)), deadline)
        client.close()
        assert frames == [store.read_frame("d/kv/00")]
        text = ask(sites["here"], "GET", "/metrics")[1].decode()
        assert 'prfaas_cache_served_objects_total{site="here"} 1\n' in text
        assert f'prfaas_cache_served_bytes_total{{site="here"}} {len(frames[0])}\n' in text
        rank = 'site="here",rank="here-prefill_0"'
        for line in (
            f'prfaas_store_hits_total{{{rank},tier="host"}} 2',
            f'prfaas_store_hits_total{{{rank},tier="backend"}} 3',
            f"prfaas_store_misses_total{{{rank}}} 1",
            f'prfaas_store_read_bytes_total{{{rank},tier="host"}} 128',
            f'prfaas_store_fetches_total{{{rank},result="begun"}} 4',
            f"prfaas_store_fetch_saved_seconds_total{{{rank}}} 0.5",
            f'prfaas_store_used_bytes{{{rank},tier="backend"}} 4096',
            f'prfaas_store_peer_rtt_seconds{{{rank},peer="there"}} 0.02',
        ):
            assert f"{line}\n" in text
        answer = json.loads(ask(sites["here"], "GET", "/cache")[1])
        assert (answer["served"]["objects"], answer["store"][0]["counters"]["misses"]) == (1, 1)
    store.close()


def test_adapters_of_servers_are_told_with_their_ids(make_site: MakeSite, fake_python: str) -> None:
    """Asked of each server after its start: an id stands for what was loaded then."""
    config = make_site("here", "pd", ("prefill", "decode"), LIMITS, agent=True)
    paths = ["--lora-paths", "red=/adapters/a", "blue=/adapters/b"]
    prefill = msgspec.structs.replace(config.servers[0], args=[*config.servers[0].args, *paths])
    config = msgspec.structs.replace(config, servers=[prefill, *config.servers[1:]])
    with running(Site(config, python=fake_python, progress=Progress(write=silent))) as sites:
        site = sites["here"]

        def told() -> list[dict[str, str]]:
            return [server["adapter_ids"] for server in json.loads(ask(site, "GET", "/site")[1])["servers"]]

        expected = [{"red": "id of /adapters/a", "blue": "id of /adapters/b"}, {}]
        wait_until(lambda: told() == expected, "the ids of adapters")
