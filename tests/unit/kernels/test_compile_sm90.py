"""The kernels compile for sm_90 within the committed registers, spills and shared memory (``sm90_table.json``)."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_LIMIT_BYTES = 227 * 1024  # what one program may use on Hopper


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_registers_spills_and_shared_memory():
    done = subprocess.run(
        [sys.executable, str(HERE / "compile_sm90.py")],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout.splitlines()[-1])
    promised = json.loads((HERE / "sm90_table.json").read_text()).get(report["triton"], {})
    for name, got in report["kernels"].items():
        assert got["shared_bytes"] <= SHARED_LIMIT_BYTES, (name, got)
        assert got["wgmma"] or name in report["rows"], (name, got)
        assert got["wide_access"], (name, got)
        if name in promised:
            assert got["spilled_bytes"] <= promised[name]["spilled_bytes"], (name, got, promised[name])
            assert got["registers"] <= promised[name]["registers"], (name, got, promised[name])
            assert got["shared_bytes"] <= promised[name]["shared_bytes"], (name, got, promised[name])
    if promised:
        assert set(promised) == set(report["kernels"])
