"""The benchmark's control flow without a GPU: plan, refusals, and (in full) a smoke run in the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BENCH = ROOT / "kernels" / "bench"
SCRIPT = BENCH / "gpu_checks.sh"
FULL = os.environ.get("PRFAAS_KERNEL_TESTS") == "full"


def command(*arguments, env=None, timeout_s=120):
    return subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_the_plan_names_every_step_and_needs_no_gpu(tmp_path):
    assert command("bash", "-n", str(SCRIPT)).returncode == 0
    done = command("bash", str(SCRIPT), "--plan", "--tune", "scan_block", env={"OUT": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    for part in ("tests: kda scalar_gates segments", "no GPU", "kda: 131072 tokens, 4 heads", "kv_pack", "scan_block"):
        assert part in done.stdout
    assert f"to {tmp_path}" in done.stdout
    assert not list(tmp_path.iterdir())


def test_every_case_file_is_in_the_script():
    cases = {path.stem for path in (ROOT / "tests/unit/kernels/triton_cases").glob("[!_c]*.py")}
    (line,) = [line for line in SCRIPT.read_text().splitlines() if line.startswith("cases=(")]
    assert set(line.removeprefix("cases=(").removesuffix(")").split()) == cases


def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = command(sys.executable, str(BENCH), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert command(sys.executable, str(BENCH), "--smoke", env={"TRITON_INTERPRET": "0"}).returncode == 2


def test_a_red_check_prints_no_figures(tmp_path):
    program = (
        f"import sys, runpy; sys.path.insert(0, {str(BENCH)!r}); import checks, figures\n"
        "checks.run_checks = lambda *a, **o: "
        "[dict(check='kda', o_error=0.5, state_error=0.0, limit=0.01, green=False)]\n"
        "figures.error_rows = lambda *a, **o: []\n"
        f"sys.argv = ['bench', '--smoke', '--out', {str(tmp_path)!r}]\n"
        f"runpy.run_path({str(BENCH)!r}, run_name='__main__')\n"
    )
    done = command(sys.executable, "-c", program, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 1, done.stderr
    assert "RED kda" in done.stdout
    assert "median" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checks.json"]


@pytest.mark.skipif(not FULL, reason="PRFAAS_KERNEL_TESTS=full")
def test_a_smoke_run_writes_the_report(tmp_path):
    env = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = command(
        sys.executable, "-W", "ignore", str(BENCH), "--smoke", "--out", str(tmp_path), env=env, timeout_s=540
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["smoke"]
    assert {"kda", "gdn", "attention", "kv_pack", "errors", "versions"} <= set(report)
    assert all(row["green"] for row in report["checks"])
    assert "control flow only" in (tmp_path / "report.md").read_text()
