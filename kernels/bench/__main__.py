"""Benchmark of the kernels on one GPU: ``python kernels/bench --out DIR [--quick] [--tune AXIS]``.

Checks come first; where one is red nothing is measured and the exit status is 1. Without a GPU it is 2.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from arms import WIDTH, case, fla, ours
from checks import kda_truth, relative_error, run_checks
from prfaas_kernels.common.tuning import DEFAULT, settings_for
from prfaas_kernels.kv_pack import PoolTable, pack_rows, unpack_rows
from timing import Arm, Times, as_graph, copy_rate_bytes_per_s, measure

RESULTS = Path(__file__).with_name("results")
#: q, k, v, g in and o out in bfloat16, beta: bytes per token and head that any implementation must move.
FLOOR_BYTES = 5 * 2 * WIDTH + 2
FULL = [(t, h, n) for t in (2048, 8192, 32768, 131072) for h in (4, 8, 16, 32) for n in (1, 8)]
QUICK = [(8192, 32, 1), (32768, 32, 1), (131072, 32, 1), (8192, 8, 1), (8192, 32, 8)]
AXES = {
    "scan_block": (16, 32, 64),
    "scan_warps": (4, 8),
    "scan_stages": (1, 2, 3),
    "prep_block": (32, 64, 128),
    "prep_warps": (4, 8),
    "prep_max_registers": (128, 168, 255),
    "solve_warps": (4, 8),
}


def versions() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "settings": str(settings_for(torch.device("cuda"))),
        "command": "python kernels/bench " + " ".join(sys.argv[1:]),
    }


def bench_kda(tokens: int, heads: int, sequences: int, copy_rate: float, iterations: int) -> dict[str, Any]:
    """One row: times of each arm, ratio to ours, share of the floor; arms that took no part, with the reason."""
    inputs = case(tokens, heads, sequences)
    mine = ours(*inputs)
    row: dict[str, Any] = {"tokens": tokens, "heads": heads, "sequences": sequences, "absent": {}}
    arms = [mine, as_graph(mine)]
    rival = fla(*inputs)
    if isinstance(rival, str):
        row["absent"]["fla"] = rival
    else:
        arms.append(rival)
    times = measure(arms, iterations=iterations)
    floor_ms = tokens * heads * FLOOR_BYTES / copy_rate * 1e3
    own = times[mine.name].median_ms
    row["times"] = {name: value._asdict() for name, value in times.items()}
    row["ratio_to_ours"] = {name: value.median_ms / own for name, value in times.items()}
    row["share_of_floor"] = floor_ms / own
    return row


def bench_errors(tokens: int = 2048, heads: int = 2) -> dict[str, float]:
    """Relative error in o of each arm against float64."""
    x, cu, initial = case(tokens, heads, 1)
    want, _ = kda_truth(x, cu, initial, None)
    arms = [arm for arm in (ours(x, cu, initial), fla(x, cu, initial)) if not isinstance(arm, str)]
    return {arm.name: relative_error(arm.run()[0][0], want) for arm in arms}


def bench_pack(copy_rate: float, iterations: int) -> dict[str, Any]:
    """MLA latents of 27 layers, 512 pages of 64 tokens: share of the device copy rate."""
    pools = [torch.randn(1024 * 64, 576, device="cuda", dtype=torch.bfloat16) for _ in range(27)]
    table = PoolTable.of(pools, page_size=64)
    pages = torch.randperm(1024, device="cuda")[:512].int()
    packed = pack_rows(table, pages)
    arms = [
        Arm("pack", lambda: pack_rows(table, pages, packed), lambda: None),
        Arm("unpack", lambda: unpack_rows(table, pages, packed), lambda: None),
    ]
    times = measure(arms, warmups=5, iterations=iterations)
    return {
        name: {"ms": t.median_ms, "share_of_copy_rate": 2 * packed.numel() / (t.median_ms / 1e3) / copy_rate}
        for name, t in times.items()
    }


def tune(axis: str, tokens: int = 8192, heads: int = 32) -> list[dict[str, Any]]:
    """Times of one setting's values, best first; a value that does not compile says why."""
    inputs, rows = case(tokens, heads, 1), []
    for value in AXES[axis]:
        arm = ours(*inputs, DEFAULT._replace(**{axis: value}))
        try:
            times: Times = measure([arm], warmups=5, iterations=30)[arm.name]
            rows.append({axis: value, "ms": times.median_ms})
        except Exception as error:  # noqa: BLE001  (out of shared memory or registers: part of the report)
            rows.append({axis: value, "ms": float("inf"), "error": repr(error)[:200]})
    return sorted(rows, key=lambda row: row["ms"])


def as_markdown(report: dict[str, Any]) -> str:
    """Tables for ``results/``."""
    lines = ["# KDA prefill on one GPU", ""]
    lines += [f"- {key}: {value}" for key, value in report["versions"].items()]
    lines += [f"- device copy: {report['copy_rate_bytes_per_s'] / 1e12:.2f} TB/s", ""]
    lines += ["| tokens | heads | sequences | arm | median ms | p10 | p90 | times ours |", "|" + "---|" * 8]
    for row in report["kda"]:
        for name, t in row["times"].items():
            lines.append(
                f"| {row['tokens']} | {row['heads']} | {row['sequences']} | {name} | {t['median_ms']:.3f} |"
                f" {t['p10_ms']:.3f} | {t['p90_ms']:.3f} | {row['ratio_to_ours'][name]:.2f} |"
            )
        lines += [f"| | | | no {name}: {why} | | | | |" for name, why in row["absent"].items()]
    lines += ["", "Share of the floor (inputs read once, output written once, at the copy rate):", ""]
    lines += [
        f"- {row['tokens']} tokens, {row['heads']} heads, {row['sequences']} sequences: {row['share_of_floor']:.2f}"
        for row in report["kda"]
    ]
    lines += ["", "Relative error in o against float64 (2048 tokens):", ""]
    lines += [f"- {name}: {error:.2e}" for name, error in report["errors"].items()]
    lines += ["", "KV pack:", ""]
    lines += [f"- {n}: {r['ms']:.3f} ms, {r['share_of_copy_rate']:.2f} of copy" for n, r in report["kv_pack"].items()]
    lines += [f"- tuning {row}" for row in report.get("tuning", [])]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)))
    parser.add_argument("--quick", action="store_true", help="five shapes and fewer iterations")
    parser.add_argument("--tune", choices=AXES, help="also measure the values of one setting")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU: nothing to measure", file=sys.stderr)
        return 2
    checks = run_checks("cuda")
    for row in checks:
        print(f"{'ok ' if row['green'] else 'RED'} {row['check']}: o {row['o_error']:.2e}, S {row['state_error']:.2e}")
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "checks.json").write_text(json.dumps(checks, indent=2) + "\n")
    if not all(row["green"] for row in checks):
        print("a check is red: no figures", file=sys.stderr)
        return 1
    iterations = 30 if args.quick else 100
    copy_rate = copy_rate_bytes_per_s()
    report: dict[str, Any] = {
        "versions": versions(),
        "checks": checks,
        "copy_rate_bytes_per_s": copy_rate,
        "errors": bench_errors(),
        "kda": [bench_kda(*shape, copy_rate, iterations) for shape in (QUICK if args.quick else FULL)],
        "kv_pack": bench_pack(copy_rate, iterations),
    }
    if args.tune:
        report["tuning"] = tune(args.tune)
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / "report.md").write_text(as_markdown(report))
    print(as_markdown(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
