"""A prefill site that decode cannot dial, on real SGLang: `launch gateway` in both sites; peers that die behind it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.config.schema import TransportConfig
from tests.transport.addresses import THERE, free_pair

from .driving import DECODE, LOCAL, PD, PRFAAS, REMOTE, Driver, post, wait_for
from .prefill_by_prfaas import assert_equal, body

pytestmark = pytest.mark.sglang

ENDED = "its process has ended"
RECONNECT_TIMEOUT_S = TransportConfig().reconnect_timeout_s


@contextlib.contextmanager
def launched(file: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`launch gateway` with a site's file."""
    argv = [sys.executable, "-m", "sglang_prfaas.launch", "gateway", str(file)]
    with log.open("wb") as output, subprocess.Popen(argv, stdout=output, stderr=output, env=os.environ) as process:
        try:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                return "gateway is ready" in log.read_text()

            wait_for(f"the gateway of {file.name}", ready)
            yield process
        finally:
            process.terminate()


@contextlib.contextmanager
def behind_gateways(cluster: Driver, folder: Path) -> Iterator[None]:
    """The PrfaaS site's bootstrap and mover ports at another address, which leads to them through both gateways."""
    deployment = cluster.cluster.deployment
    server = deployment.prfaas().servers[0]
    ports = [server.bootstrap_port, server.mover_port, server.mover_port + 1]
    gateway = f'dial = "prefill"\ngateway = "{THERE}:{free_pair(THERE)}"\n'
    files = {}
    for original, more in ((deployment.prfaas_file, ""), (deployment.pd_file, f"gateway_ports = {ports}\n")):
        text = original.read_text()
        if "[[links]]" not in text:
            text += '\n[[links]]\nto_site = "prfaas"\ncapacity_gbps = 10\n'
        files[original.stem] = folder / original.name
        files[original.stem].write_text(text.replace("capacity_gbps = 10\n", f"capacity_gbps = 10\n{gateway}{more}"))
    log = folder / "gateway-pd.log"
    with launched(files["pd"], log), launched(files["prfaas"], folder / "gateway-prfaas.log"):
        wait_for("the PrfaaS site to dial in", lambda: "site prfaas has dialled in" in log.read_text())
        yield


def ask(cluster: Driver, decode: str, length: int, room: int) -> tuple[concurrent.futures.Future[Any], list[int]]:
    """A prompt to the PrfaaS site's server and, through the gateways, from there to `decode`; decode's answer."""
    prompt = [random.Random(room).randrange(10, 500) for _ in range(length)]
    port = cluster.cluster.sites[PRFAAS].server(REMOTE).command.bootstrap_port
    pair = {**body(prompt), "bootstrap_host": THERE, "bootstrap_port": port, "bootstrap_room": room}
    pool = concurrent.futures.ThreadPoolExecutor(2)
    pool.submit(_post, f"{cluster.url(REMOTE)}/generate", pair)
    answer = pool.submit(_post, f"{cluster.url(decode)}/generate", pair)
    pool.shutdown(wait=False)
    return answer, prompt


def _post(url: str, pair: Any) -> Any:
    with contextlib.suppress(OSError, http.client.HTTPException):
        return post(url, pair)
    return None


def through(cluster: Driver, decode: str) -> None:
    """Tokens through the gateways are those of the single server."""
    room = random.getrandbits(62)
    answer, prompt = ask(cluster, decode, 700, room)
    status, _, given = answer.result()
    assert status == 200, given
    assert_equal(given, post(f"{cluster.reference_url}/generate", body(prompt))[2])
    records = cluster.records(room)
    assert [r.status for r in records] == ["done", "done"], records
    (took,) = (r for r in records if r.role == "decode")
    assert took.peer.startswith(f"{THERE}:"), took


def killed_in_mid_transfer(cluster: Driver, site: str, name: str, decode: str, witness: str) -> None:
    """Kill a server once prefill's second chunk has begun; the mover of `witness`, at the other end, notices by itself,
    long before any timeout, and the request fails there with that reason."""
    cluster.wait_idle(REMOTE, decode)
    offset, room = cluster.log_size(REMOTE), random.getrandbits(62)
    answer, _ = ask(cluster, decode, 14000, room)
    wait_for("the third prefill chunk", lambda: cluster.prefill_batches_since(REMOTE, offset) >= 3)
    offset, killed_s = cluster.log_size(witness), time.monotonic()
    cluster.cluster.sites[site].kill(name)
    wait_for(
        f"{witness} to notice that {name} was killed",
        lambda: ENDED.encode() in cluster.log(witness).read_bytes()[offset:],
        deadline_s=RECONNECT_TIMEOUT_S,
    )
    print(f"{name} killed: {witness} noticed after {time.monotonic() - killed_s:.2f} s")
    answer.result()
    role = "prefill" if witness == REMOTE else "decode"
    (record,) = wait_for(
        f"the record of {role}", lambda: [r for r in cluster.all_records() if (r.room, r.role) == (room, role)]
    )
    assert record.status == "failed"
    assert ENDED in record.reason, record


def test_through_gateways(cluster: Driver, tmp_path: Path) -> None:
    cluster.wait_idle(REMOTE, LOCAL, DECODE)
    with behind_gateways(cluster, tmp_path):
        through(cluster, DECODE)
        killed_in_mid_transfer(cluster, PD, DECODE, DECODE, witness=REMOTE)
        cluster.wait_idle(REMOTE)
        cluster.switch_role(LOCAL, "decode")
        try:
            through(cluster, LOCAL)
            killed_in_mid_transfer(cluster, PRFAAS, REMOTE, LOCAL, witness=LOCAL)
            cluster.cluster.sites[PRFAAS].wait_ready(REMOTE)
            through(cluster, LOCAL)
        finally:
            cluster.wait_idle(LOCAL)
            cluster.switch_role(LOCAL, "prefill")
        cluster.cluster.sites[PD].wait_ready(DECODE)
        through(cluster, DECODE)
    cluster.wait_usual_roles()
