"""Driving a local deployment from tests: requests to the router, to servers, and waiting for what should come."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from sglang_prfaas.launch.demo_client import Answer, complete
from sglang_prfaas.launch.local_deployment import MODEL_NAME, LocalCluster, alive_servers
from sglang_prfaas.site.free_ports import HeldPort
from sglang_prfaas.transport import transfer_log
from sglang_prfaas.transport.transfer_log import TransferRecord

DEADLINE_S = 300.0
PRFAAS, PD = "prfaas", "pd"
REMOTE, LOCAL, DECODE = "prfaas-prefill-0", "pd-prefill-0", "pd-decode-0"
ROLES = {REMOTE: "prefill", LOCAL: "prefill", DECODE: "decode"}

T = TypeVar("T")


def wait_for(what: str, probe: Callable[[], T | None], deadline_s: float = DEADLINE_S) -> T:
    """Call `probe` until it gives something true. Fails the test with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while True:
        result = probe()
        if result:
            return result
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {deadline_s:g} s")
        time.sleep(0.05)


def post(
    url: str, body: Any, timeout_s: float = DEADLINE_S, headers: Mapping[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """POST JSON: status, headers, and the decoded answer (text where it is no JSON)."""
    sent = {"content-type": "application/json", **(headers or {})}
    return fetch(urllib.request.Request(url, json.dumps(body).encode(), sent), timeout_s)


def fetch(request: urllib.request.Request | str, timeout_s: float = 60.0) -> tuple[int, dict[str, str], Any]:
    """Status, headers, and the decoded answer (text where it is no JSON), whatever the status."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, dict(response.headers.items()), _decoded(response.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers.items()), _decoded(error.read())


def get(url: str, timeout_s: float = 60.0) -> Any:
    """GET JSON."""
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return json.loads(response.read())


def _decoded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")


class RouterProcess:
    """A router of its own process on a router's file, with flags of its own; killed and started again on one port."""

    def __init__(self, file: Path, log: Path, *flags: str) -> None:
        port = HeldPort()
        port.release()
        self.url = f"http://127.0.0.1:{port.port}"
        self._log = log
        argv = [sys.executable, "-m", "sglang_prfaas.launch", "router", str(file)]
        self._argv = [*argv, "--router.port", str(port.port), *flags]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start; `wait_sees` waits for it."""
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self._argv, stdout=output, stderr=output, env=environ)

    def wait_sees(self, roles: Mapping[str, str]) -> None:
        """Wait until it takes these servers to be alive, in these roles, and no others."""

        def sees() -> bool:
            assert self._process is not None
            assert self._process.poll() is None, self._log.read_text()[-4000:]
            return alive_servers(self.url) == roles

        wait_for(f"the router of {self.url}", sees)

    def stop(self, *, kill: bool = False) -> None:
        """End it and wait; kill: as a crash would."""
        if self._process is not None:
            (self._process.kill if kill else self._process.terminate)()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def another_router(file: Path, log: Path, *flags: str, roles: Mapping[str, str] = ROLES) -> Iterator[str]:
    """One more router on a router's file, with flags of its own; gives its URL once `roles` are all there."""
    router = RouterProcess(file, log, *flags)
    try:
        router.start()
        router.wait_sees(roles)
        yield router.url
    finally:
        router.stop()


class Driver:
    """What tests do with a cluster."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.router_url = cluster.router_url
        self.reference_url = cluster.reference_url

    def url(self, name: str) -> str:
        """Base URL of a server by its name."""
        site = PRFAAS if name == REMOTE else PD
        return self.cluster.sites[site].url(name)

    def ask(self, prompt: str | list[dict[str, str]], max_tokens: int = 16, **options: Any) -> Answer:
        """One streamed request to the router."""
        return complete(self.router_url, MODEL_NAME, prompt, max_tokens, **options)

    def expected(self, prompt: str | list[dict[str, str]], max_tokens: int = 16, **options: Any) -> Answer:
        """The same request to the single server."""
        return complete(self.reference_url, MODEL_NAME, prompt, max_tokens, **options)

    def assert_equal(self, answer: Answer, prompt: str | list[dict[str, str]], max_tokens: int = 16) -> None:
        """All tokens are those of the single server."""
        assert answer.status == 200, answer.error
        assert not answer.error
        assert len(answer.token_ids) == max_tokens
        assert answer.token_ids == self.expected(prompt, max_tokens).token_ids

    def records(self, room: int | str, count: int = 2) -> list[TransferRecord]:
        """What prefill and decode noted of a request's transfer."""

        def probe() -> list[TransferRecord] | None:
            found = [r for r in transfer_log.read(self.log_path) if r.room == int(room)]
            return found if len(found) >= count else None

        return wait_for(f"{count} records of room {room} in the transfer log", probe)

    def all_records(self) -> list[TransferRecord]:
        """The whole transfer log."""
        return transfer_log.read(self.log_path)

    @property
    def log_path(self) -> str:
        return str(self.cluster.deployment.transfer_log)

    def received(self, answer: Answer) -> TransferRecord:
        """What decode noted of the transfer of a request."""
        return next(r for r in self.records(answer.routing["room"]) if r.role == "decode")

    def loads(self, name: str) -> dict[str, Any]:
        """The load SGLang reports of a server."""
        report: dict[str, Any] = get(f"{self.url(name)}/v1/loads")["loads"][0]
        return report

    def wait_idle(self, *names: str) -> None:
        """Wait until servers hold no request and no page of one."""

        def idle() -> bool:
            for name in names:
                load = self.loads(name)
                queues = [value for key, value in load["disaggregation"].items() if key.endswith("_reqs")]
                if load["num_running_reqs"] or load["num_waiting_reqs"] or any(queues):
                    return False
            return True

        wait_for(f"{', '.join(names)} idle", idle)

    def wait_empty(self, name: str) -> None:
        """Wait until a server holds no KVCache, not even that of a health check."""
        wait_for(f"{name} without KVCache", lambda: self.loads(name)["num_used_tokens"] == 0)

    def switch_role(self, name: str, role: str) -> None:
        """`/pd_role_switch`, again while a health check keeps the server busy."""

        def switch() -> bool:
            status, _, answer = post(
                f"{self.url(name)}/pd_role_switch", {"new_role": role, "decode_cuda_graph_memory_gb": 0}
            )
            if status != 200 and "not idle" in str(answer):
                return False
            assert status == 200, answer
            assert answer["success"], answer
            return True

        wait_for(f"{name} takes the role {role}", switch)

    def wait_usual_roles(self) -> None:
        """Wait until the router sees every server in the role it was started in, and alive."""
        wait_for("the router to see the usual roles", lambda: alive_servers(self.router_url) == ROLES)

    def log_size(self, name: str) -> int:
        """Length of a server's log now, in bytes."""
        return self.log(name).stat().st_size

    def prefill_batches_since(self, name: str, offset: int) -> int:
        """Prefill chunks a server has begun since its log was `offset` bytes long."""
        with self.log(name).open("rb") as file:
            file.seek(offset)
            return sum(b"Prefill batch" in line and b"#new-token: 0" not in line for line in file)

    def log(self, name: str) -> Any:
        """The path of a server's log."""
        return self.cluster.sites[PRFAAS if name == REMOTE else PD].log(name)


def words(seed: str, count: int) -> str:
    """A prompt of `count` words, of its own for every seed: about four tokens a word."""
    from sglang_prfaas.launch.demo import prompt_text

    return prompt_text(seed, count)


def prefills_since(sites: Driver, server: str, offset: int) -> tuple[int, int]:
    """Tokens that a server computed, and took from its caches, since its log was `offset` bytes long; without those of
    health checks, which are prompts of one token."""

    def batches() -> list[tuple[int, int]]:
        text = sites.log(server).read_bytes()[offset:].decode(errors="replace")
        found = re.findall(r"Prefill batch.*?#new-token: (\d+), #cached-token: (\d+)", text)
        return [(int(new), int(cached)) for new, cached in found if int(new) + int(cached) > 1]

    found = wait_for(f"a prefill in the log of {server}", batches)
    return sum(new for new, _ in found), sum(cached for _, cached in found)
