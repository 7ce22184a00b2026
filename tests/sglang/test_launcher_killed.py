"""`launch site` as a process of its own, killed while requests run: nothing of it is left, nobody gets a wrong token,
and after it is started again everything is as before, for a router that was there all the time."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sglang_prfaas.launch.demo_client import complete
from sglang_prfaas.launch.local_deployment import MODEL_NAME
from sglang_prfaas.site.free_ports import free_ports

from .driving import DEADLINE_S, DECODE, LOCAL, PD, PRFAAS, REMOTE, ROLES, Driver, RouterProcess, get, wait_for, words
from .test_cache_routing import generate, ids
from .test_restarts import Asker

pytestmark = pytest.mark.sglang

STREAM_TOKENS = 300
AT_ONCE_S = 15.0
"""Less than an orphan takes that goes on loading, and then finds its parent gone."""


class Launcher:
    """`launch site` with a site's file, on ports of its own; killed and started again."""

    def __init__(self, site: str, file: Path, servers: tuple[str, ...], directory: Path, temporary: Path) -> None:
        self.agent_port, self.reports_port, *ports = free_ports(2 + 2 * len(servers))
        self.temporary = temporary
        self._site = site
        self._log = directory / "launcher.log"
        argv = [sys.executable, "-m", "sglang_prfaas.launch", "site", str(file), "--json-status"]
        for server in servers:
            argv += [f"--servers.{server}.port={ports.pop()}", f"--servers.{server}.bootstrap_port={ports.pop()}"]
            argv += [f"--servers.{server}.mover_port=0"]
        argv += [f"--agent.port={self.agent_port}", f"--agent.reports_port={self.reports_port}"]
        self._argv = [*argv, f"--site.log_dir={directory}"]
        self._process: subprocess.Popen[str] | None = None

    def router(self, file: Path, log: Path) -> RouterProcess:
        """A router that has this site in the place of the one of its name. Not started yet."""
        scheme = "https" if self._site == PRFAAS else "http"
        url = f"--sites.{self._site}.agent_url={scheme}://127.0.0.1:{self.agent_port}"
        return RouterProcess(file, log, url, f"--sites.{self._site}.reports_port={self.reports_port}")

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start; `wait_ready` waits for it."""
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                self._argv,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "TMPDIR": str(self.temporary)},
            )

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self._log.read_text()[-4000:]
        assert json.loads(line)["event"] == "ready"

    def wait_children(self, count: int) -> list[psutil.Process]:
        """Wait until it has so many processes below it. Returns all of them."""
        parent = psutil.Process(self.process.pid)

        def children() -> list[psutil.Process]:
            found = parent.children(recursive=True)
            return found if len(found) >= count else []

        return wait_for(f"{count} processes of the launcher", children)

    def directories(self) -> set[Path]:
        return set(self.temporary.glob("prfaas-*"))

    def kill(self) -> None:
        """End it as the kernel does when memory runs out."""
        self.process.kill()
        self.process.communicate()

    def stop(self) -> int:
        """End it in order. Returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


def wait_gone(processes: list[psutil.Process], deadline_s: float) -> None:
    def left() -> list[psutil.Process]:
        return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    def gone() -> bool:
        try:
            return not left()
        except psutil.NoSuchProcess:
            return False

    wait_for(f"the end of {[one.pid for one in processes]}", gone, deadline_s)


@pytest.fixture
def launcher(request: pytest.FixtureRequest, cluster: Driver, tmp_path: Path) -> Iterator[Launcher]:
    """Another site beside the cluster's, in the place of its own for the router of the test."""
    deployment = cluster.cluster.deployment
    file, servers = {
        PRFAAS: (deployment.prfaas_file, (REMOTE,)),
        PD: (deployment.pd_file, (LOCAL, DECODE)),
    }[request.param]
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as temporary:
        made = Launcher(request.param, file, servers, tmp_path, Path(temporary))
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("launcher", [PRFAAS], indirect=True)
def test_of_a_prfaas_site_nobody_notices_it(cluster: Driver, launcher: Launcher, tmp_path: Path) -> None:
    # Killed while its server starts: SGLang's processes do not look after their parent yet.
    launcher.start()
    starting = launcher.wait_children(len(("server", "guard", "resource tracker", "scheduler")))
    launcher.kill()
    wait_gone(starting, AT_ONCE_S)

    launcher.start()
    launcher.wait_ready()
    router = launcher.router(cluster.cluster.deployment.router_file, tmp_path / "router.log")
    far = [ids(seed, 900) for seed in (71, 72)]
    near = [ids(73, 300)]
    expected = {tuple(one): generate(cluster.reference_url, one)[1]["output_ids"] for one in (*far, *near)}
    askers = [Asker(router.url, {tuple(one): expected[tuple(one)] for one in asked}) for asked in (far, near)]
    try:
        router.start()
        router.wait_sees(ROLES)
        headers, _ = generate(router.url, ids(74, 900))
        assert headers["x-prfaas-prefill"].endswith(REMOTE)
        processes, directories = launcher.wait_children(4), launcher.directories()
        assert directories
        with askers[0].asking(), askers[1].asking():
            for asker in askers:
                asker.wait_asked(2)
            launcher.kill()
            wait_gone(processes, AT_ONCE_S)
            router.wait_sees({name: role for name, role in ROLES.items() if name != REMOTE})
            for asker in askers:
                asker.wait_asked(2)
            assert launcher.directories() >= directories

            launcher.start()
            launcher.wait_ready()
            router.wait_sees(ROLES)
            for asker in askers:
                asker.wait_asked(2)
        assert [asker.wrong for asker in askers] == [[], []]
        assert [asker.failed for asker in askers] == [0, 0], "prefills that a site has begun are made in the other one"
        assert not launcher.directories() & directories, "the killed one's are removed"

        asked = words("after the restart", 400)
        answer = complete(router.url, MODEL_NAME, asked, 16)
        assert answer.routing["prefill"].endswith(REMOTE)
        cluster.assert_equal(answer, asked)
        assert {record.status for record in cluster.records(answer.routing["room"])} == {"done"}
        assert launcher.stop() == 0
        assert not launcher.directories()
        headers, _ = generate(router.url, ids(75, 900))
        assert headers["x-prfaas-prefill"].endswith(LOCAL)
    finally:
        router.stop()


@pytest.mark.parametrize("launcher", [PD], indirect=True)
def test_of_a_pd_site_streams_end_with_an_error(cluster: Driver, launcher: Launcher, tmp_path: Path) -> None:
    launcher.start()
    prompts = [words("streams at home", 20), words("streams over the link", 200)]
    expected = [cluster.expected(prompt, STREAM_TOKENS).token_ids for prompt in prompts]
    launcher.wait_ready()
    router = launcher.router(cluster.cluster.deployment.router_file, tmp_path / "router.log")
    loads = f"http://127.0.0.1:{launcher.agent_port}/servers/{DECODE}/v1/loads"
    try:
        router.start()
        router.wait_sees(ROLES)
        processes = launcher.wait_children(8)
        with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
            streams = [pool.submit(complete, router.url, MODEL_NAME, one, STREAM_TOKENS) for one in prompts]
            wait_for("streams", lambda: get(loads)["loads"][0]["num_running_reqs"] == len(prompts))
            launcher.kill()
            answers = [stream.result() for stream in streams]
        wait_gone(processes, AT_ONCE_S)
        for answer, tokens in zip(answers, expected, strict=True):
            assert answer.error, "a stream that broke off must not look like a whole one"
            assert answer.token_ids == tokens[: len(answer.token_ids)]
            assert len(answer.token_ids) < STREAM_TOKENS
        router.wait_sees({REMOTE: ROLES[REMOTE]})
        refused = complete(router.url, MODEL_NAME, prompts[0], 16)
        assert (refused.status, refused.token_ids) == (503, [])

        launcher.start()
        launcher.wait_ready()
        router.wait_sees(ROLES)
        for prompt, tokens in zip(prompts, expected, strict=True):
            answer = complete(router.url, MODEL_NAME, prompt, 16)
            assert (answer.error, answer.token_ids) == ("", tokens[:16])
        assert launcher.stop() == 0
    finally:
        router.stop()
