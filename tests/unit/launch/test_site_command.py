"""`launch site` as a process of its own: ready line, signals, exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sglang_prfaas.config.schema import SiteConfig
from tests.unit.site.conftest import LIMITS, PATIENCE_S, MakeSite, changed, is_gone, wait_until

Launch = Callable[..., "subprocess.Popen[str]"]


def flags_of(config: SiteConfig) -> list[str]:
    """A configuration as flags: no file is needed."""
    flags = [f"--site.{key}={getattr(config.site, key)}" for key in ("name", "role", "model", "log_dir")]
    flags += [f"--site.env.{key}={value}" for key, value in config.site.env.items()]
    flags += [f"--limits.{key}={getattr(config.limits, key)}" for key in config.limits.__struct_fields__]
    flags += [f"--agent.port={config.agent.port}"]
    for server in config.servers:
        path = f"--servers.{server.name}"
        flags += [f"{path}.role={server.role}", f"{path}.port={server.port}"]
        flags += [f"{path}.bootstrap_port={server.bootstrap_port}"]
        flags += [f"{path}.env.{key}={value}" for key, value in server.env.items()]
    return flags


@pytest.fixture
def launch(fake_python: str) -> Iterator[Launch]:
    """Starts `launch site`; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(config: SiteConfig, *more: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_prfaas.launch", "site", "--python", fake_python, *flags_of(config), *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def short_temporary() -> Iterator[Path]:
    """A temporary directory whose path leaves room for those of Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as directory:
        yield Path(directory)


def ready(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(f"not ready:\n{process.communicate()[1]}")
    return line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ready_line_and_orderly_stop(
    launch: Launch,
    make_site: MakeSite,
    events: Callable[[], list[str]],
    number: signal.Signals,
) -> None:
    config = make_site(agent=True)
    process = launch(config, "--json-status")
    status = json.loads(ready(process))
    assert (status["event"], status["site"], status["role"]) == ("ready", "pd", "pd")
    assert status["agent_url"] == f"http://127.0.0.1:{config.agent.port}"
    pids = [server["pid"] for server in status["servers"]]
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert all(is_gone(pid) for pid in pids)
    assert [line for line in events() if line.endswith(" ends")] == ["prefill_0 ends", "decode_1 ends"]
    assert "[pd] stopping" in err


def test_a_second_signal_kills_at_once(launch: Launch, make_site: MakeSite, events: Callable[[], list[str]]) -> None:
    process = launch(make_site(decode_1={"FAKE_DEAF": "1"}))
    assert ready(process).startswith("site pd is ready: prefill_0 http://127.0.0.1:")
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: "decode_1 asked to end" in events(), "the first signal to arrive")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0


def test_a_site_that_cannot_start_is_status_1(launch: Launch, make_site: MakeSite) -> None:
    process = launch(make_site(decode_1={"FAKE_EXIT": "7"}))
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (1, "")
    assert (
        "error: server decode_1 failed: died before it was ready (exit status 7): RuntimeError: no such device" in err
    )


def test_a_site_all_of_whose_servers_are_given_up_is_status_1(launch: Launch, make_site: MakeSite) -> None:
    process = launch(make_site(limits=changed(LIMITS, max_restarts=0)), "--json-status")
    for server in json.loads(ready(process))["servers"]:
        os.kill(server["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "all servers were given up" in err


def test_stop_while_starting(launch: Launch, make_site: MakeSite, tmp_path: Path) -> None:
    process = launch(make_site(decode_1={"FAKE_SLOW": str(tmp_path / "never")}))
    log = tmp_path / "logs" / "pd" / "decode_1.log"
    wait_until(lambda: log.exists() and "hello" in log.read_text(), "the server to begin")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0


def test_what_a_killed_launcher_left_is_removed_by_the_next(
    launch: Launch, make_site: MakeSite, short_temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = short_temporary
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    config = make_site(agent=True)
    killed = launch(config, "--json-status")
    pids = [server["pid"] for server in json.loads(ready(killed))["servers"]]
    left = set(temporary.glob("prfaas-*"))
    assert len(left) == 3, "the movers' socket, and metrics of two servers"
    killed.kill()
    killed.wait()
    wait_until(lambda: all(is_gone(pid) for pid in pids), "the servers to end")
    assert set(temporary.glob("prfaas-*")) == left

    following = launch(config, "--json-status")
    ready(following)
    present = set(temporary.glob("prfaas-*"))
    assert len(present) == 3
    assert not present & left
    following.terminate()
    _, err = following.communicate(timeout=PATIENCE_S)
    assert err.count("whose launcher was killed") == 3
    assert not list(temporary.glob("prfaas-*"))
