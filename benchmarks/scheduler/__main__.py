"""The scheduler against the paper, against other policies on a virtual clock, and against the clock.

    python -m benchmarks.scheduler --json OUT [--trace conversation_trace.jsonl] [--markdown docs/reproduction.md]

The trace is the Mooncake conversation trace (kvcache-ai/Mooncake, FAST'25 release). Simulations repeat exactly; the
times of decisions and of the solver depend on the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.scheduler import case_study, replay, report, role_shift, speed
from sglang_prfaas.launch.plan import paper_json
from sglang_prfaas.launch.tables import write_json
from sglang_prfaas.scheduler import planner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, metavar="OUT", help="file for the results")
    parser.add_argument("--render", action="store_true", help="measure nothing: write the markdown from the JSON file")
    parser.add_argument("--trace", metavar="FILE", help="Mooncake trace to replay")
    parser.add_argument("--only-trace", action="store_true", help="replay the trace, keep what else the JSON file has")
    parser.add_argument("--duration", type=float, default=2400.0, help="simulated seconds of each case study run")
    parser.add_argument("--markdown", metavar="FILE", help="write docs/reproduction.md, too")
    args = parser.parse_args()

    results: dict[str, Any]
    if args.only_trace and not args.trace:
        parser.error("--only-trace needs --trace FILE")
    if args.render:
        return _write(msgspec.json.decode(Path(args.json).read_bytes()), args.markdown)
    if args.only_trace:
        kept = msgspec.json.decode(Path(args.json).read_bytes())
        results = {**kept, "trace": replay.measure(args.trace)}
        write_json(args.json, results)
        return _write(msgspec.to_builtins(results), args.markdown)
    rows = [*planner.compare_table6(), *planner.compare_section_2_3(), *planner.compare_table5()]
    results = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "paper": paper_json(rows),
    }
    print("case study", file=sys.stderr)
    results["case_study"], results["case_study_s"] = case_study.measure(args.duration), args.duration
    print("role changes", file=sys.stderr)
    results["roles"] = role_shift.measure()
    if args.trace:
        print("trace", file=sys.stderr)
        results["trace"] = replay.measure(args.trace)
    results["speed"] = speed.measure()
    write_json(args.json, results)
    return _write(msgspec.to_builtins(results), args.markdown)


def _write(results: dict[str, Any], path: str | None) -> int:
    rows = [*planner.compare_table6(), *planner.compare_section_2_3(), *planner.compare_table5()]
    text = report.markdown(rows, results)
    if path:
        Path(path).write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
