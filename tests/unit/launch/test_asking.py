"""Asking what runs, by file and by URL, and what `launch status` makes of the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sglang_prfaas.config.load import load_site
from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.errors import ConfigError, LaunchError
from sglang_prfaas.launch.__main__ import main
from sglang_prfaas.launch.asking import Endpoint, ask, endpoint_of
from sglang_prfaas.launch.status import router_status, site_status
from sglang_prfaas.site.agent import Agent
from sglang_prfaas.site.free_ports import HeldPort
from sglang_prfaas.site.threaded import LoopThread
from tests.transport.keyring import Keyring
from tests.unit.config.conftest import PRFAAS, ROUTER

SITE: dict[str, Any] = {
    "name": "pd",
    "role": "pd",
    "draining": False,
    "servers": [
        {"name": "p0", "role": "prefill", "state": "ready", "restarts": 0, "change": ""},
        {"name": "d0", "role": "decode", "state": "restarting", "restarts": 2, "change": ""},
    ],
    "links": [
        {
            "from_site": "pd",
            "to_site": "third",
            "used_bytes_per_s": 125e6,
            "capacity_bytes_per_s": 250e6,
            "connections": 4,
            "rtt_s": 0.012,
            "congested": True,
            "congestion": "delay",
        }
    ],
    "configured_links": [{"to_site": "third", "capacity_gbps": 2.0}, {"to_site": "prfaas", "capacity_gbps": 10.0}],
}
ROUTER_HEALTH: dict[str, Any] = {
    "status": "no prefill server",
    "threshold_tokens": 2000,
    "servers": [
        {"site": "pd", "name": "p0", "role": "prefill", "alive": False, "error": "no connection"},
        {"site": "pd", "name": "d0", "role": "decode", "alive": True, "error": None},
    ],
}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[tuple[Path, SiteConfig]]:
    """The file of a site whose agent runs, by HTTPS with keys; it has no servers yet."""
    keyring = Keyring(tmp_path / "keys")
    held = HeldPort()
    port = held.port
    file = tmp_path / "prfaas.toml"
    keys = f'\n[transport]\nkeys_dir = "{keyring.directory / "prfaas"}"\n'
    file.write_text(PRFAAS.replace("port = 9010", f"port = {port}\ntls = true") + keys)
    config = load_site(file)
    thread = LoopThread()
    running = Agent(config, {})
    held.release()
    thread.run(running.start())
    try:
        yield file, config
    finally:
        thread.run(running.stop(0))
        thread.close()


def test_an_agent_with_keys_is_asked_by_its_file(
    agent: tuple[Path, SiteConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, config = agent
    endpoint = endpoint_of(str(file))
    assert endpoint.url == f"https://127.0.0.1:{config.agent.port}"
    assert ask(endpoint, "/site")["name"] == "prfaas"
    assert main(["status", str(file), "--json", str(tmp_path / "out.json")]) == 0
    assert "site prfaas (prfaas), 0 of 0 servers ready" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())[str(file)]["role"] == "prfaas"
    assert main(["cache", str(file)]) == 0
    with pytest.raises(LaunchError, match="is it running"):
        ask(msgspec.structs.replace(endpoint, site="third"), "/site")
    with pytest.raises(LaunchError, match="is it running"):
        ask(endpoint_of(endpoint.url), "/site")


def test_endpoints(tmp_path: Path) -> None:
    file = tmp_path / "router.toml"
    file.write_text(ROUTER + "\n[limits]\nmax_retries = 1\n")
    assert endpoint_of(str(file)) == Endpoint("http://127.0.0.1:8000")
    assert endpoint_of("http://[fd00::1]:8000/") == Endpoint("http://[fd00::1]:8000")
    with pytest.raises(ConfigError, match="neither http:// nor https://"):
        endpoint_of("ftp://10.0.0.1")


def test_a_target_that_does_not_answer_is_no_reason_to_leave_the_others_out(
    agent: tuple[Path, SiteConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    held = HeldPort()  # bound, not listening
    try:
        assert main(["status", f"http://127.0.0.1:{held.port}", str(agent[0])]) == 1
    finally:
        held.release()
    out, err = capsys.readouterr()
    assert "site prfaas" in out
    assert "is it running?" in err


def test_a_site_that_is_not_whole() -> None:
    well, text = site_status(SITE)
    assert not well
    assert "site pd (pd), 1 of 2 servers ready" in text
    assert "restarting         2" in text
    assert "link pd to third: 1 of 2 Gbit/s used, 4 connections, round trip 12.00 ms, congested (delay)" in text
    assert "link to prfaas: 10 Gbit/s configured, nothing sent yet" in text
    assert "link to third" not in text
    assert site_status({**SITE, "servers": SITE["servers"][:1]})[0]
    assert not site_status({**SITE, "servers": SITE["servers"][:1], "draining": True})[0]


def test_a_router_without_servers_is_not_well() -> None:
    well, text = router_status(ROUTER_HEALTH)
    assert not well
    assert "router, no prefill server; 1 of 2 servers alive, t 2000 tokens" in text
    assert "no connection" in text
    assert not router_status({**ROUTER_HEALTH, "servers": []})[0]
    alive = [{**server, "alive": True} for server in ROUTER_HEALTH["servers"]]
    lost = {**ROUTER_HEALTH, "status": "ok", "servers": alive, "agent_errors": {"far": "Name or service not known"}}
    well, text = router_status(lost)
    assert not well
    assert text.endswith("agent of site far: Name or service not known")
    assert router_status({**ROUTER_HEALTH, "status": "ok", "servers": alive})[0]
