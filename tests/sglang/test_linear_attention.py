"""`--linear-attn-prefill-backend prfaas`: in SGLang's dispatchers, and in servers that answer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_prfaas.tiny_models import cpu_server_env, make_tiny_model

from . import prefill_by_prfaas
from .driving import Driver, post
from .test_cpu_platform import FAMILY, running_server

pytestmark = pytest.mark.sglang

CASES = Path(__file__).parent / "dispatcher_cases" / "linear_attention.py"
INTERPRET = {"TRITON_INTERPRET": "1"}


@pytest.mark.parametrize("environment", [{}, INTERPRET], ids=["torch", "interpreter"])
def test_dispatchers(environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(CASES)]
    done = subprocess.run(
        command,
        env={**os.environ, **cpu_server_env(FAMILY), **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_kda_through_two_sites(cluster: Driver) -> None:
    prefill_by_prfaas.check(cluster, "kda")


def test_triton_kernels_in_the_interpreter(cluster: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose KDA prefill runs in Triton's interpreter gives what torch gives."""
    model = make_tiny_model(FAMILY, tmp_path / FAMILY)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    log = tmp_path / "interpreter.log"
    source = random.Random(1)
    with running_server(model, log, *prefill_by_prfaas.BACKEND) as address:
        for length in (17, 70):
            body = prefill_by_prfaas.body([source.randrange(10, 500) for _ in range(length)])
            answers = [post(f"{url}/generate", body)[2] for url in (address, cluster.reference_url)]
            prefill_by_prfaas.assert_equal(*answers)
    assert "kda runs on triton: all inputs are supported" in log.read_text()
