"""Real SGLang servers for the tests: two sites on this machine, started once, in parallel."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_prfaas.launch.local_deployment import Choices, LocalCluster, run_deployment, write_deployment

from . import prefill_by_prfaas
from .driving import Driver

RUNNING: list[LocalCluster] = []


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """Kimi Linear (KDA + MLA): a prefill server in the PrfaaS site, a prefill and a decode server in the PD site, a
    router, and a single server to compare with. Prefill chunks of 512 tokens; more than 512 uncached tokens go out.
    KVCache moves with keys here, without in the clusters of families. KDA's prefill runs on prfaas_kernels in the two
    prefill servers, on the CPU platform's stand-in for SGLang's kernel in the others."""
    choices = Choices(chunk_tokens=512, keys=True, mover_ports=True, prefill_args=prefill_by_prfaas.BACKEND)
    deployment = write_deployment(tmp_path_factory.mktemp("kimi-linear"), choices)
    with run_deployment(deployment) as running:
        RUNNING.append(running)
        yield Driver(running)
        RUNNING.remove(running)


@pytest.fixture(scope="module")
def family_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """The same for the choices a test module is parametrised with."""
    choices: Choices = request.param
    deployment = write_deployment(tmp_path_factory.mktemp(choices.family), choices)
    with run_deployment(deployment) as running:
        RUNNING.append(running)
        yield Driver(running)
        RUNNING.remove(running)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    """A failing test shows the end of every server's log."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.failed:
        for running in RUNNING:
            for name, path in running.logs.items():
                report.sections.append((f"log of {name}: {path}", _tail(path)))


def _tail(path: Path, lines: int = 60) -> str:
    try:
        return "\n".join(line[:400] for line in path.read_text(errors="replace").splitlines()[-lines:])
    except OSError as error:
        return str(error)
