"""`python -m benchmarks.transport` on a small request, with the movers that are installed."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.transport import iperf3, plan
from benchmarks.transport.links import ROUND_TRIP_S, opened, why_not
from benchmarks.transport.movers import MOVERS, why_absent
from benchmarks.transport.movers.base import Mover
from benchmarks.transport.workload import WORKLOADS

TIMEOUT_S = 240
REPOSITORY = Path(__file__).parents[2]
KEYS = {
    "mover",
    "workload",
    "link",
    "gb_per_s",
    "cpu_s_per_gb",
    "gb_per_s_min",
    "gb_per_s_max",
    "exposed_s",
    "rounds",
    "verified",
}


def test_every_installed_mover_has_a_verified_row(tmp_path: Path) -> None:
    json, page = tmp_path / "out.json", tmp_path / "out.md"
    command = [sys.executable, "-m", "benchmarks.transport", "--quick", "--rounds", "1", "--links", "loopback"]
    command += ["--workloads", "quick", "--json", str(json), "--markdown", str(page)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    result = msgspec.json.decode(json.read_bytes())
    absent = {item["what"]: item for item in result["absent"]}
    rows = {row["mover"]: row for row in result["rows"]}
    assert {"prfaas", "plain", "prfaas+tls", "prfaas+256"} <= set(rows)
    for name in plan.ARMS:
        why = absent.get(name) or absent.get(name.partition("+")[0])
        assert (name in rows) != (why is not None), done.stdout
        if why is not None:
            assert why["reason"]
            assert why["install"]
    for name, row in rows.items():
        assert set(row) >= KEYS
        assert row["gb_per_s"] > 0
        assert row["cpu_s_per_gb"] > 0
        assert row["fraction"] > 0
        assert row["verified"] is (name != "iperf3")
    assert rows["prfaas+tls"]["tls"].startswith("TLSv1.3")
    assert result["command"].startswith("python -m benchmarks.transport --quick")
    assert result["versions"]["python"]
    assert result["failed"] == []
    assert "`prfaas+tls`" in page.read_text()


def measured(directory: Path, *options: str) -> dict[str, Any]:
    """The result of a quick run over loopback."""
    json = directory / "out.json"
    command = [sys.executable, "-m", "benchmarks.transport", "--quick", "--links", "loopback", "--json", str(json)]
    done = subprocess.run(
        [*command, *options], cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = msgspec.json.decode(json.read_bytes())
    return result


def test_a_run_of_one_mover_asks_for_no_other(tmp_path: Path) -> None:
    result = measured(tmp_path, "--rounds", "1", "--workloads", "quick", "--movers", "plain")
    assert [row["mover"] for row in result["rows"]] == ["plain"]
    assert result["absent"] == []


def test_what_a_prefill_takes_is_not_exposed(tmp_path: Path) -> None:
    result = measured(tmp_path, "--rounds", "3", "--workloads", "quick-layers", "--movers", "prfaas,plain")
    workload = WORKLOADS["quick-layers"]
    assert {row["mover"] for row in result["rows"]} == {"prfaas", "plain"}
    for row in result["rows"]:
        assert row["verified"]
        assert row["exposed_s"] > 0
        wall_s = workload.total_bytes / 1e9 / row["gb_per_s"]
        assert wall_s == pytest.approx(workload.prefill_s + row["exposed_s"], rel=0.1)


CLONE_NEWUSER = 0x10000000


def _as_nobody() -> None:
    """Give up every privilege: a user that is mapped to nobody."""
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER):
        os._exit(NOT_PERMITTED)


NOT_PERMITTED = 77


def test_without_rights_and_without_others_what_is_missing_is_named(tmp_path: Path) -> None:
    for name in ("mooncake", "nixl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ModuleNotFoundError('No module named {name}')")
    json = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.transport", "--quick", "--rounds", "1", "--workloads", "block"]
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    done = subprocess.run(
        [*command, "--json", str(json)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": path, "PATH": "/nowhere"},
        preexec_fn=_as_nobody,
    )
    if done.returncode == NOT_PERMITTED:
        pytest.skip("user namespaces are not permitted here")
    assert done.returncode == 0, done.stdout + done.stderr
    result = msgspec.json.decode(json.read_bytes())
    assert {row["mover"] for row in result["rows"]} == {"prfaas", "plain"}
    assert {row["link"] for row in result["rows"]} == {"loopback"}
    absent = {item["what"]: item["reason"] for item in result["absent"]}
    assert set(absent) == {"mooncake", "nixl", "iperf3", "veth-1gbit"}
    assert absent["iperf3"] == "no iperf3 on PATH"
    assert absent["veth-1gbit"] == "network namespaces are for root only here (unshare: Operation not permitted)"
    for what, reason in absent.items():
        assert f"{what} is not measured: {reason}" in done.stdout


def test_a_mover_that_cannot_be_imported_is_absent_with_the_reason() -> None:
    broken = Mover(MOVERS["plain"].sender, MOVERS["plain"].receiver, modules=("no_such_mover",))
    assert why_absent(broken) == "ModuleNotFoundError: No module named 'no_such_mover'"
    assert why_absent(MOVERS["plain"]) == ""


def test_iperf3_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert iperf3.why_absent() == "no iperf3 on PATH"


@pytest.mark.skipif(bool(why_not("rtt-50ms")), reason=why_not("rtt-50ms"))
def test_a_round_trip_over_the_delay_line_takes_its_time_and_loses_nothing() -> None:
    payload = bytes(range(256)) * 4096
    with opened("rtt-50ms", "cubic") as link:
        listener = link.receive_side(lambda: socket.create_server((link.receive_host, 0)))
        client = link.send_side(lambda: socket.create_connection(listener.getsockname(), 30.0))
        server, _ = listener.accept()
        with listener, client, server:
            server.settimeout(30.0)
            began_s = time.monotonic()
            client.sendall(b"?")
            assert server.recv(1) == b"?"
            server.sendall(b"!")
            assert client.recv(1) == b"!"
            assert time.monotonic() - began_s >= ROUND_TRIP_S
            sender = threading.Thread(target=client.sendall, args=(payload,))
            sender.start()
            received = bytearray()
            while len(received) < len(payload):
                part = server.recv(1 << 20)
                assert part, "closed early"
                received += part
            sender.join(30.0)
            assert received == payload
            assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"cubic"
