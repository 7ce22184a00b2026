"""Sites of fake servers on free ports."""

from __future__ import annotations

import http.client
import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from sglang_prfaas.config.schema import (
    AgentConfig,
    ServerConfig,
    ServerRole,
    SiteConfig,
    SiteLimits,
    SiteRole,
    SiteSection,
)
from sglang_prfaas.site.free_ports import free_ports

PATIENCE_S = 60.0

LIMITS = SiteLimits(
    startup_timeout_s=PATIENCE_S,
    stop_timeout_s=PATIENCE_S,
    health_interval_s=0.05,
    health_timeout_s=PATIENCE_S,
    restart_backoff_s=0.01,
)

MakeSite = Callable[..., SiteConfig]


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    """An interpreter that runs the fake server whatever module it is asked for."""
    path = tmp_path / "python"
    fake = Path(__file__).with_name("fake_server.py")
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{fake}" "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def make_site(tmp_path: Path) -> MakeSite:
    """Builds the configuration of a site: one prefill server and one decode server, or what `roles` says."""

    def make(
        name: str = "pd",
        role: SiteRole = "pd",
        roles: tuple[ServerRole, ...] = ("prefill", "decode"),
        limits: SiteLimits = LIMITS,
        agent: bool = False,
        **env: dict[str, str],
    ) -> SiteConfig:
        ports = free_ports(2 * len(roles) + 1)
        servers = [
            ServerConfig(
                name=f"{server_role}_{index}",
                role=server_role,
                port=ports[2 * index],
                bootstrap_port=ports[2 * index + 1] if server_role == "prefill" else 0,
                env=env.get(f"{server_role}_{index}", {}),
            )
            for index, server_role in enumerate(roles)
        ]
        return SiteConfig(
            site=SiteSection(
                name=name,
                role=role,
                model="owner/model",
                env={"FAKE_EVENTS": str(tmp_path / "events")},
                log_dir=str(tmp_path / "logs" / name),
            ),
            servers=servers,
            agent=AgentConfig(port=ports[-1] if agent else 0),
            limits=limits,
        )

    return make


@pytest.fixture
def events(tmp_path: Path) -> Callable[[], list[str]]:
    """What the fake servers recorded, in order."""
    return lambda: (tmp_path / "events").read_text().splitlines()


def changed(limits: SiteLimits, **values: float) -> SiteLimits:
    return msgspec.structs.replace(limits, **values)


def is_gone(pid: int) -> bool:
    """Whether a process ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.02)


def own_environ(**more: str) -> dict[str, str]:
    return {**os.environ, **more}


def ask_agent(agent_url: str, method: str, target: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body of an agent's answer."""
    parts = urlsplit(agent_url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=PATIENCE_S)
    try:
        connection.request(method, target, body)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()
