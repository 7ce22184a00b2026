"""Benchmark of the kernels on one GPU: ``python kernels/bench --out DIR [--quick] [--tune AXIS]``.

Checks come first; where one is red nothing is measured or printed and the exit status is 1. Without a GPU it is 2.
``--plan`` says what would run; ``--smoke`` runs all of it on a CPU with tiny shapes (TRITON_INTERPRET=1), whose times
mean nothing. JSON and Markdown go to ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checks import run_checks
from figures import (
    AXES,
    FULL,
    QUICK,
    QUICK_GDN,
    SMOKE,
    Budget,
    attention_rows,
    error_rows,
    linear_row,
    pack_rows_figures,
    tune_rows,
)
from prfaas_kernels.common.tuning import settings_for
from report import as_markdown
from timing import copy_rate_bytes_per_s

RESULTS = Path(__file__).with_name("results")


def versions(device: str) -> dict[str, str]:
    """What the figures depend on."""
    packages = {}
    for name in ("fla-core", "sglang"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        **packages,
        "settings": str(settings_for(torch.device(device))),
        "command": "python kernels/bench " + " ".join(sys.argv[1:]),
    }


def plan(args: argparse.Namespace) -> str:
    """What a run with ``args`` would do, line by line."""
    shapes = QUICK if args.quick else FULL
    lines = [f"device: {'a GPU is there' if torch.cuda.is_available() else 'no GPU: a run would end with status 2'}"]
    lines += [
        f"{key}: {value}" for key, value in versions("cpu").items() if key in ("torch", "triton", "fla-core", "sglang")
    ]
    lines.append("checks against float64; nothing is printed where one is red")
    lines += [f"kda: {s.tokens} tokens, {s.heads} heads, sequences of {s.lengths()[:5]}" for s in shapes]
    lines += [f"gdn: {s.tokens} tokens, {s.heads} heads" for s in (QUICK_GDN if args.quick else FULL)]
    lines += ["attention: GQA without prefix, absorbed MLA after a paged prefix", "kv_pack: plain, int8, float8"]
    lines += [f"tuning: {args.tune} of {AXES[args.tune]}"] if args.tune else []
    return "\n".join([*lines, f"report.json, report.md, checks.json to {args.out}"])


def run(args: argparse.Namespace, budget: Budget) -> int:
    """Checks, then figures into ``args.out``. Returns the exit status."""
    small = {"width": 32, "lengths": (70, 1)} if args.smoke else {}
    checks = run_checks(budget.device, **small)
    for row in checks:
        print(f"{'ok ' if row['green'] else 'RED'} {row['check']}: o {row['o_error']:.2e}, S {row['state_error']:.2e}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "checks.json").write_text(json.dumps(checks, indent=2) + "\n")
    errors = error_rows(budget, **({"tokens": 130, "heads": 1} if args.smoke else {}))
    if not all(row["green"] for row in (*checks, *errors)):
        print(f"a check is red, no figures: {errors}", file=sys.stderr)
        return 1
    copy_rate = copy_rate_bytes_per_s(budget.device, 1 << 20 if args.smoke else 4 << 30)
    shapes = SMOKE if args.smoke else QUICK if args.quick else FULL
    gdn_shapes = SMOKE if args.smoke else QUICK_GDN if args.quick else FULL
    report: dict[str, Any] = {
        "smoke": args.smoke,
        "versions": versions(budget.device),
        "checks": checks,
        "copy_rate_bytes_per_s": copy_rate,
        "errors": errors,
        "kda": [linear_row("kda", shape, copy_rate, budget) for shape in shapes],
        "gdn": [linear_row("gdn", shape, copy_rate, budget) for shape in gdn_shapes],
        "attention": attention_rows(budget, smoke=args.smoke),
        "kv_pack": pack_rows_figures(copy_rate, budget, smoke=args.smoke),
    }
    if args.tune:
        report["tuning"] = tune_rows(args.tune, budget, smoke=args.smoke)
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "report.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return 0


def main() -> int:
    """Parse the command line and run. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python kernels/bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)))
    parser.add_argument("--quick", action="store_true", help="fewer shapes and iterations")
    parser.add_argument("--tune", choices=AXES, help="also measure the values of one setting")
    parser.add_argument("--plan", action="store_true", help="say what would run, and stop")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, to see that everything runs")
    args = parser.parse_args()
    if args.plan:
        print(plan(args))
        return 0
    if args.smoke:
        if not triton.knobs.runtime.interpret:
            print("--smoke needs TRITON_INTERPRET=1", file=sys.stderr)
            return 2
        return run(args, Budget("cpu", 1, 1, width=32))
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure (--plan and --smoke work without one)", file=sys.stderr)
        return 2
    return run(args, Budget("cuda", 10 if args.quick else 25, 30 if args.quick else 100))


if __name__ == "__main__":
    sys.exit(main())
