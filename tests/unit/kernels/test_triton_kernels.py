"""Starts the cases of ``triton_cases``, and the mover's that use a kernel, in processes of their own: Triton reads
TRITON_INTERPRET when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = [*sorted((HERE / "triton_cases").glob("[!_c]*.py")), HERE.parent / "transport" / "test_device_memory.py"]
TIMEOUT_S = 900


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_cases(path):
    # The interpreter multiplies products that are masked afterwards; they may overflow.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    done = subprocess.run(
        [*command, str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
