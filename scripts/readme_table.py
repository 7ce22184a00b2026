#!/usr/bin/env python3
"""Puts the demo's table into README.md, between its two markers.

make demo JSON=out.json && python3 scripts/readme_table.py out.json
"""

import json
import re
import sys
from pathlib import Path

BEGIN, END = "<!-- demo table -->", "<!-- end of demo table -->"


def main() -> int:
    report = json.loads(Path(sys.argv[1]).read_text())
    head = (
        "request",
        "prompt",
        "route",
        "why",
        "over the link",
        "queue",
        "prefill",
        "transfer",
        "first token",
        "equal",
    )
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in report["rows"]:
        link = f"{row['link_bytes'] / 2**20:.2f} MiB" if row["link_bytes"] else "-"
        cells = [row["request"], str(row["prompt_tokens"]), row["route"], row["reason"], link]
        for key in ("queue_s", "prefill_s", "transfer_s", "first_token_s"):
            cells.append("-" if row[key] is None else f"{row[key] * 1000:.0f} ms")
        lines.append("| " + " | ".join([*cells, "yes" if row["equal"] else "**no**"]) + " |")
    lines.append("")
    lines.append(f"{report['equal']} of {report['requests']} equal ({report['model']}, `make demo JSON=out.json`).")
    table = "\n".join([BEGIN, *lines, END])
    readme = Path(__file__).resolve().parent.parent / "README.md"
    text, count = re.subn(f"{BEGIN}.*?{END}", lambda _: table, readme.read_text(), flags=re.DOTALL)
    if count != 1:
        sys.exit(f"README.md has {count} places between {BEGIN} and {END}, expected 1")
    readme.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
