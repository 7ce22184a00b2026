"""Why layers are not sent as they are written: every mode that is in the way is one line of the log."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_prfaas.tiny_models import cpu_server_env

pytestmark = pytest.mark.sglang

CASES = Path(__file__).parent / "layerwise_cases" / "modes.py"


def test_modes() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(CASES)]
    done = subprocess.run(
        command,
        env={**os.environ, **cpu_server_env("qwen3")},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
