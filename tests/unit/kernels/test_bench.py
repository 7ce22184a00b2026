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
    for part in (
        "tests: kda scalar_gates segments",
        "no GPU",
        "kda: 131072 tokens, 4 heads",
        "lightning: 8192",
        "kv_pack",
    ):
        assert part in done.stdout
    assert f"to {tmp_path}" in done.stdout
    assert not list(tmp_path.iterdir())


def test_every_case_file_is_in_the_script():
    cases = {path.with_suffix("") for path in (ROOT / "tests/unit/kernels/triton_cases").glob("[!_c]*.py")}
    (line,) = [line for line in SCRIPT.read_text().splitlines() if line.startswith("cases=(")]
    named = command("bash", "-c", f'{line}; printf "%s\\n" "${{cases[@]}}"').stdout.split()
    assert {ROOT / "tests" / name for name in named} == cases | {ROOT / "tests/unit/transport/test_device_memory"}


def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = command(sys.executable, str(BENCH), "--out", str(tmp_path))
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert command(sys.executable, str(BENCH), "--smoke", env={"TRITON_INTERPRET": "0"}).returncode == 2
    report = tmp_path / "report.md"
    report.write_text("of a GPU")
    done = command("bash", str(SCRIPT), env={"OUT": str(tmp_path)})
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert report.read_text() == "of a GPU"


STUB = """#!/usr/bin/env bash
case "$*" in
    *"import pytest"*) exit 1 ;;
    *"--parts kda"*) exit 3 ;;
    *"--parts gdn"*) exec sleep 300 ;;
    *"--parts kv_pack"*) echo figures >"$OUT/report.md" ;;
esac
"""


def test_a_step_that_fails_or_hangs_does_not_end_the_others(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    out = tmp_path / "out"
    env = {"PYTHON": str(stub), "OUT": str(out), "PART_S": "5"}
    done = command("bash", str(SCRIPT), "--tune", "scan_block", env=env)
    assert done.returncode == 3, done.stderr
    said = [line.partition(" after")[0] for line in (out / "summary.txt").read_text().splitlines()]
    assert said == [
        "tests: none, pytest is not installed",
        "benchmark of kda: failed (3)",
        "benchmark of gdn: out of time",
        "benchmark of kv_pack: ok",
        "benchmark of lightning: ok",
        "benchmark of attention: ok",
        "tuning of scan_block: ok",
    ]
    assert "figures" in done.stdout


def test_no_step_begins_when_the_time_is_up(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = command("bash", str(SCRIPT), env={"PYTHON": str(stub), "OUT": str(tmp_path), "TOTAL_S": "0"})
    assert done.returncode == 124
    assert (tmp_path / "summary.txt").read_text().count("out of time") == 5
    assert not (tmp_path / "report.md").exists()


WITH_PATCHES = """
import runpy, sys
sys.path.insert(0, {bench!r})
import checks, figures, pack_figures
def run_checks(part, *_, **__):
    if part == "gdn":
        raise RuntimeError("this check broke")
    return [dict(check=part, o_error=0.5, state_error=0.0, limit=0.01, green=part == "kv_pack")]
checks.run_checks = run_checks
pack_figures.pack_rows_figures = lambda *_, **__: [dict(name="pack", ms=1.0, bytes=10, share_of_copy_rate=0.5)]
sys.argv = ["bench", "--smoke", "--parts", "kda", "gdn", "kv_pack", "--out", {out!r}]
runpy.run_path({bench!r}, run_name="__main__")
"""


def test_a_part_with_a_red_check_has_no_figures_and_the_others_have(tmp_path):
    program = WITH_PATCHES.format(bench=str(BENCH), out=str(tmp_path))
    done = command(sys.executable, "-c", program, env={"TRITON_INTERPRET": "1"})
    assert done.returncode == 1, done.stderr
    assert "RED kda" in done.stdout
    assert "KDA prefill" not in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == ["kda: a check is red", "gdn: this check broke"]
    assert {"kda", "gdn"}.isdisjoint(report)
    assert report["kv_pack"][0]["share_of_copy_rate"] == 0.5
    assert "gdn: this check broke" in (tmp_path / "report.md").read_text()


def test_a_check_that_raises_is_red():
    program = (
        f"import sys; sys.path.insert(0, {str(BENCH)!r}); import checks, json\n"
        "checks.encode_rows = None\n"
        "print(json.dumps(checks.run_checks('kv_pack', 'cpu')))\n"
    )
    done = command(sys.executable, "-c", program, env={"TRITON_INTERPRET": "1"})
    (row,) = json.loads(done.stdout)
    assert not row["green"]
    assert "not callable" in row["error"]


@pytest.mark.skipif(not FULL, reason="PRFAAS_KERNEL_TESTS=full")
def test_a_smoke_run_writes_the_report(tmp_path):
    env = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = command(
        sys.executable, "-W", "ignore", str(BENCH), "--smoke", "--out", str(tmp_path), env=env, timeout_s=540
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["smoke"]
    assert {"kda", "gdn", "lightning", "attention", "kv_pack", "errors", "versions"} <= set(report)
    assert {row["operator"] for row in report["errors"]} == {"kda", "gdn", "lightning"}
    assert all(row["green"] for row in (*report["checks"], *report["errors"]))
    assert "failures" not in report
    assert "control flow only" in (tmp_path / "report.md").read_text()
