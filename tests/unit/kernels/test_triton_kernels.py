"""Starts the cases of ``triton_cases``: Triton reads TRITON_INTERPRET when it is imported, so in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "triton_cases"
TIMEOUT_S = 900


@pytest.mark.parametrize("name", sorted(path.stem for path in CASES.glob("[!_c]*.py")))
def test_cases(name):
    # The interpreter multiplies products that are masked afterwards; they may overflow.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [*command, str(CASES / f"{name}.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
