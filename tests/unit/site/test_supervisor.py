"""The supervisor with real, tiny child processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sglang_prfaas.config.schema import SiteConfig
from sglang_prfaas.errors import LaunchError
from sglang_prfaas.site import Site, running
from sglang_prfaas.site.lifecycle import State
from sglang_prfaas.site.progress import Progress
from tests.unit.site.conftest import LIMITS, MakeSite, changed, is_gone, wait_until

Events = Callable[[], list[str]]


def site_of(config: SiteConfig, python: str, lines: list[str] | None = None) -> Site:
    write = (lambda line: None) if lines is None else lines.append
    return Site(config, python=python, progress=Progress(config.site.name, write, interval_s=0.05))


def test_start_and_stop_in_order(make_site: MakeSite, fake_python: str, events: Events) -> None:
    lines: list[str] = []
    config = make_site(roles=("decode", "prefill", "decode", "prefill"))
    with running(site_of(config, fake_python, lines), drain=True) as sites:
        pids = [sites["pd"].pid(server.name) for server in config.servers]
        assert {sites["pd"].server(server.name).state for server in config.servers} == {State.READY}
        assert len(set(pids)) == 4
        assert "hello from prefill_1" in sites["pd"].tail("prefill_1")
        assert all(os.getpgid(pid) == pid for pid in pids), "each server leads a process group"
    assert all(is_gone(pid) for pid in pids)
    ends = [line for line in events() if line.endswith((" asked to end", " ends"))]
    assert {line.split("_")[0] for line in ends[:4]} == {"prefill"}, "prefill servers end before decode is asked"
    assert {line.split("_")[0] for line in ends[4:]} == {"decode"}
    assert len(ends) == 8
    assert any("prefill_1: ready after" in line for line in lines)


def test_metrics_of_every_start_have_a_directory_of_their_own(
    make_site: MakeSite, fake_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = tmp_path / "own"
    own.mkdir()
    config = make_site(roles=("prefill", "decode", "decode"), decode_2={"PROMETHEUS_MULTIPROC_DIR": str(own)})

    def made() -> set[Path]:
        return set(tmp_path.glob("prfaas-metrics-*"))

    with running(site_of(config, fake_python)) as sites:
        first = made()
        assert len(first) == 2
        sites["pd"].kill("decode_1")
        wait_until(lambda: len(made() - first) == 1, "the directory of the second start")
        sites["pd"].wait_ready("decode_1")
        assert len(made()) == 2
    assert not made()
    assert own.is_dir()


def test_two_sites_at_once(make_site: MakeSite, fake_python: str) -> None:
    pd, prfaas = make_site("pd"), make_site("prfaas", "prfaas", ("prefill",))
    with running(site_of(pd, fake_python), site_of(prfaas, fake_python)) as sites:
        assert sorted(sites) == ["pd", "prfaas"]
        assert sites["prfaas"].server("prefill_0").command.env["PRFAAS_SITE"] == "prfaas"


def test_a_server_that_cannot_start_shows_its_log_and_ends_the_others(make_site: MakeSite, fake_python: str) -> None:
    lines: list[str] = []
    config = make_site(decode_1={"FAKE_EXIT": "3"})
    site = site_of(config, fake_python, lines)
    with pytest.raises(LaunchError) as caught, running(site):
        pass
    message = str(caught.value)
    assert message.startswith("server decode_1 failed: died before it was ready (exit status 3): RuntimeError: no such")
    assert "  | RuntimeError: no such device" in message
    assert str(site.servers["decode_1"].log) in message
    assert site.servers["prefill_0"].state is State.STOPPED
    assert site.servers["prefill_0"].pid is None


def test_a_command_that_does_not_exist(make_site: MakeSite, tmp_path: Path) -> None:
    site = site_of(make_site(roles=("decode",)), str(tmp_path / "absent"))
    with pytest.raises(LaunchError, match=r"cannot run .*absent: No such file or directory"), running(site):
        pass


def test_a_server_that_is_never_ready(make_site: MakeSite, fake_python: str, tmp_path: Path) -> None:
    limits = changed(LIMITS, startup_timeout_s=0.5)
    lines: list[str] = []
    config = make_site(roles=("decode",), limits=limits, decode_0={"FAKE_SLOW": str(tmp_path / "never")})
    with pytest.raises(LaunchError, match=r"not ready within 0\.5 s"), running(site_of(config, fake_python, lines)):
        pass
    assert any("starting for" in line for line in lines), "progress is shown while waiting"


def test_a_dead_server_is_restarted(make_site: MakeSite, fake_python: str, tmp_path: Path) -> None:
    child = tmp_path / "child"
    config = make_site(prefill_0={"FAKE_CHILD": str(child)})
    with running(site_of(config, fake_python)) as sites:
        site = sites["pd"]
        before, grandchild = site.pid("prefill_0"), int(child.read_text())
        other = site.pid("decode_1")
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: site.server("prefill_0").restarts == 1, "the restart")
        site.wait_ready("prefill_0")
        assert site.pid("prefill_0") != before
        assert is_gone(grandchild), "what a dead server leaves of its group is ended"
        assert site.pid("decode_1") == other
        assert "ended with signal SIGKILL" in site.tail("prefill_0")


def test_a_server_that_keeps_dying_is_given_up(make_site: MakeSite, fake_python: str) -> None:
    config = make_site(limits=changed(LIMITS, max_restarts=1))
    with running(site_of(config, fake_python)) as sites:
        site = sites["pd"]
        site.kill("decode_1")
        site.wait_ready("decode_1")
        site.kill("decode_1")
        wait_until(lambda: site.server("decode_1").state is State.FAILED, "giving up")
        with pytest.raises(LaunchError, match="died again after 1 restarts"):
            site.wait_ready("decode_1")
        assert site.server("prefill_0").state is State.READY
        site.start("decode_1")
        site.wait_ready("decode_1")


def test_a_sick_server_is_reported_and_replaced(make_site: MakeSite, fake_python: str, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    config = make_site(
        roles=("decode",), limits=changed(LIMITS, unhealthy_timeout_s=0.2), decode_0={"FAKE_SICK": str(sick)}
    )
    with running(site_of(config, fake_python)) as sites:
        server = sites["pd"].server("decode_0")
        sick.touch()
        wait_until(lambda: server.restarts == 1, "the replacement")
        sick.unlink()
        sites["pd"].wait_ready("decode_0")


def test_a_deaf_server_is_killed(make_site: MakeSite, fake_python: str, events: Events) -> None:
    config = make_site(roles=("decode",), limits=changed(LIMITS, stop_timeout_s=0.3), decode_0={"FAKE_DEAF": "1"})
    with running(site_of(config, fake_python), drain=True) as sites:
        pid = sites["pd"].pid("decode_0")
    assert is_gone(pid)
    assert events()[-1] == "decode_0 asked to end"


def test_stop_start_and_restart_of_one_server(make_site: MakeSite, fake_python: str, events: Events) -> None:
    with running(site_of(make_site(), fake_python)) as sites:
        site = sites["pd"]
        site.stop("decode_1")
        assert events()[-1] == "decode_1 ends"
        with pytest.raises(LaunchError, match="does not run, it is stopped"):
            site.pid("decode_1")
        site.start("decode_1")
        site.wait_ready("decode_1")
        before = site.pid("decode_1")
        site.restart("decode_1")
        site.wait_ready("decode_1")
        assert site.pid("decode_1") != before
        site.stop("decode_1", at_once=True)
        assert events()[-1] == "decode_1 started"


def test_ports_in_use_are_named_with_their_user(make_site: MakeSite, fake_python: str, events: Events) -> None:
    config = make_site()
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", config.servers[0].bootstrap_port))
        mine.listen()
        with pytest.raises(LaunchError) as caught, running(site_of(config, fake_python)):
            pass
    port = config.servers[0].bootstrap_port
    assert f"port {port} (the bootstrap of server prefill_0) is in use by pid {os.getpid()} (" in str(caught.value)
    assert "--servers.prefill_0.bootstrap_port" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        events()


def test_ready_waits_for_the_bootstrap(make_site: MakeSite, fake_python: str) -> None:
    """A server whose bootstrap does not listen is not ready, whatever its health says."""
    config = make_site(roles=("prefill",), limits=changed(LIMITS, startup_timeout_s=1.0))
    site = site_of(config, fake_python)
    server = site.servers["prefill_0"]
    argv = [arg for arg in server.command.argv if arg != "--disaggregation-bootstrap-port"]
    server.command = msgspec.structs.replace(server.command, argv=tuple(argv))
    with pytest.raises(LaunchError, match="not ready within 1 s"), running(site):
        pass


def test_no_server_outlives_a_launcher_that_is_killed(make_site: MakeSite, fake_python: str, tmp_path: Path) -> None:
    config, theirs = tmp_path / "config.json", tmp_path / "child"
    config.write_bytes(msgspec.json.encode(make_site(prefill_0={"FAKE_CHILD": str(theirs)})))
    script = """
        import sys, time, msgspec
        from sglang_prfaas.config.schema import SiteConfig
        from sglang_prfaas.site import Site, running
        config = msgspec.json.decode(open(sys.argv[1]).read(), type=SiteConfig)
        with running(Site(config, python=sys.argv[2])) as sites:
            print(*[sites["pd"].pid(server.name) for server in config.servers], flush=True)
            time.sleep(600)
    """
    launcher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(config), fake_python],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert launcher.stdout is not None
        with launcher.stdout:
            pids = [int(pid) for pid in launcher.stdout.readline().split()]
        assert len(pids) == 2
        child = int(theirs.read_text())
        group = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _group_of(int(pid)) == pids[0]]
        (guard,) = set(group) - {pids[0], child}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(guard, number)
        assert not is_gone(child)
        pids += [child, guard]
    finally:
        launcher.kill()
        launcher.wait()
    wait_until(lambda: all(is_gone(pid) for pid in pids), "the servers to end, and what they started")


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0
