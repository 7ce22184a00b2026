"""Benchmark of the kernels on one GPU: ``python kernels/bench --out DIR [--quick] [--tune AXIS]``.

Each part's checks come first; where one is red nothing of the part is measured or printed, and the exit status is 1.
Reports are written row by row: what ends a part early does not lose what was measured. Without a GPU it exits with 2.
``--plan`` says what would run; ``--smoke`` runs all of it on a CPU with tiny shapes (TRITON_INTERPRET=1), whose times
mean nothing. JSON and Markdown go to ``--out``.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arms import OURS
from attention_figures import attention_rows
from checks import run_checks
from figures import AXES, FULL, QUICK, QUICK_SCALAR, SMOKE, Budget, Shape, error_row, linear_row, tune_rows
from pack_figures import pack_rows_figures
from prfaas_kernels.common.tuning import settings_for
from report import MARKDOWN_NAME, Report
from rivals import FLA_ENVIRONMENT, Dispatched, brief
from timing import copy_rate_bytes_per_s

RESULTS = Path(__file__).with_name("results")
OTHER_PARTS = {
    "kv_pack": "plain, int8, float8",
    "attention": "GQA without prefix, absorbed MLA after a paged prefix",
}
PARTS = (*OURS, *OTHER_PARTS)


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
        "environment": " ".join(f"{name}={os.environ[name]}" for name in FLA_ENVIRONMENT),
        "settings": str(settings_for(torch.device(device))),
        "command": os.environ.get("BENCH_COMMAND", "python kernels/bench " + " ".join(sys.argv[1:])),
    }


def shapes_of(args: argparse.Namespace) -> dict[str, list[Shape]]:
    """Operator -> what is measured."""
    wide, scalar = (SMOKE, SMOKE) if args.smoke else (QUICK, QUICK_SCALAR) if args.quick else (FULL, FULL)
    return {"kda": wide, "gdn": scalar, "lightning": scalar}


def plan(args: argparse.Namespace) -> str:
    """What a run with ``args`` would do, line by line."""
    lines = [f"device: {'a GPU is there' if torch.cuda.is_available() else 'no GPU: a run would end with status 2'}"]
    lines += [
        f"{key}: {value}" for key, value in versions("cpu").items() if key in ("torch", "triton", "fla-core", "sglang")
    ]
    lines.append("checks against float64; nothing is printed where one is red")
    for part in args.parts:
        shapes = shapes_of(args).get(part, [])
        lines += [f"{part}: {s.tokens} tokens, {s.heads} heads, sequences of {s.lengths()[:5]}" for s in shapes]
        lines += [f"{part}: {OTHER_PARTS[part]}"] if part in OTHER_PARTS else []
    lines += [f"tuning: {args.tune} of {AXES[args.tune]}"] if args.tune else []
    return "\n".join([*lines, f"report.json and report.md to {args.out}"])


def run_part(part: str, args: argparse.Namespace, budget: Budget, report: Report) -> bool:
    """Checks of ``part``, then its figures, row by row into ``report``. Whether its checks were green."""
    small: dict[str, Any] = {"width": 32, "lengths": (70, 1)} if args.smoke else {}
    rows = run_checks(part, budget.device, **small)
    report.add("checks", *rows)
    for row in rows:
        print(f"{'ok ' if row['green'] else 'RED'} {row['check']}: o {row['o_error']:.2e}, S {row['state_error']:.2e}")
    verdicts = [row["green"] for row in rows]
    if part in OURS and all(verdicts):
        error = error_row(part, budget, **({"tokens": 130, "heads": 1} if args.smoke else {}))
        report.add("errors", error)
        verdicts.append(error["green"])
    if not all(verdicts):
        report.add("failures", f"{part}: a check is red")
        return False
    copy_rate = report.sections["copy_rate_bytes_per_s"]
    if part == "attention":
        figures: Iterable[dict[str, Any]] = attention_rows(budget, smoke=args.smoke)
    elif part == "kv_pack":
        figures = pack_rows_figures(copy_rate, budget, smoke=args.smoke)
    else:
        figures = (linear_row(part, shape, copy_rate, budget) for shape in shapes_of(args)[part])
    for row in figures:
        report.add(part, row)
    return True


@torch.inference_mode()
def run(args: argparse.Namespace, budget: Budget) -> int:
    """All parts, whatever becomes of the one before; then tuning. Returns the exit status.

    In inference mode, as a server runs, and as fla-core demands for cutting long sequences into segments.
    """
    dispatched, report, status = Dispatched(), Report(args.out, add=args.add), 0
    dispatched.attach()
    report.set(
        smoke=args.smoke,
        versions=versions(budget.device),
        copy_rate_bytes_per_s=copy_rate_bytes_per_s(budget.device, 1 << 20 if args.smoke else 4 << 30),
    )
    for part in args.parts:
        try:
            if not run_part(part, args, budget, report):
                status = 1
        except Exception as error:  # noqa: BLE001  (the report says so, and the next part is measured)
            traceback.print_exc()
            report.add("failures", f"{part}: {brief(error)}")
            status = 1
    if args.tune:
        report.add("tuning", *tune_rows(args.tune, budget, smoke=args.smoke))
    if dispatched.lines:
        report.add("fla_dispatched", *dispatched.lines)
    print((args.out / MARKDOWN_NAME).read_text())
    return status


def main() -> int:
    """Parse the command line and run. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python kernels/bench", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)))
    parser.add_argument("--quick", action="store_true", help="fewer shapes and iterations")
    parser.add_argument("--tune", choices=AXES, help="also measure the values of one setting")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="what is measured (all)")
    parser.add_argument("--add", action="store_true", help="add to the report that is in --out")
    parser.add_argument("--plan", action="store_true", help="say what would run, and stop")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU, to see that everything runs")
    args = parser.parse_args()
    os.environ.update(FLA_ENVIRONMENT)
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
