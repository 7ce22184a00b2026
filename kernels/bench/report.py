"""The report in JSON and Markdown, written again after every row: what comes after loses nothing that was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

JSON_NAME, MARKDOWN_NAME = "report.json", "report.md"


class Report:
    """Sections by name, each a list of rows or a value, in ``folder``."""

    def __init__(self, folder: Path, *, add: bool) -> None:
        """``add``: go on with the report that is there."""
        self.folder = folder
        path = folder / JSON_NAME
        self.sections: dict[str, Any] = json.loads(path.read_text()) if add and path.exists() else {}
        folder.mkdir(parents=True, exist_ok=True)

    def set(self, **values: Any) -> None:
        """Replace sections."""
        self.sections.update(values)
        self._write()

    def add(self, section: str, *rows: Any) -> None:
        """Append to a section."""
        self.sections.setdefault(section, []).extend(rows)
        self._write()

    def _write(self) -> None:
        (self.folder / JSON_NAME).write_text(json.dumps(self.sections, indent=2) + "\n")
        (self.folder / MARKDOWN_NAME).write_text(as_markdown(self.sections))


def _linear(title: str, rows: list[dict[str, Any]]) -> list[str]:
    lines = [f"## {title}", "", "| tokens | heads | sequences | arm | median ms | p10 | p90 | times ours | of floor |"]
    lines.append("|" + "---|" * 9)
    for row in rows:
        for name, t in row["times"].items():
            share = f"{row['share_of_floor']:.2f}" if name == "prfaas" else ""
            lines.append(
                f"| {row['tokens']} | {row['heads']} | {row['sequences']} | {name} | {t['median_ms']:.3f} |"
                f" {t['p10_ms']:.3f} | {t['p90_ms']:.3f} | {row['ratio_to_ours'][name]:.2f} | {share} |"
            )
    absent = sorted({why for row in rows for why in row["absent"]})
    return [*lines, "", *(f"- took no part: {why}" for why in absent), ""]


def _attention(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Prefill attention", "", "| case | arm | median ms | TFLOP/s |", "|---|---|---|---|"]
    for row in rows:
        for name, t in row["times"].items():
            lines.append(f"| {row['name']} | {name} | {t['median_ms']:.3f} | {row['tflops'][name]:.1f} |")
    return [*lines, "", *(f"- took no part: {why}" for row in rows for why in row["absent"]), ""]


def _kv_pack(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## KV pack", "", "| launch | ms | MB moved | of the copy rate |", "|---|---|---|---|"]
    for row in rows:
        share = f"{row['share_of_copy_rate']:.2f}"
        lines.append(f"| {row['name']} | {row['ms']:.3f} | {row['bytes'] / 1e6:.1f} | {share} |")
    return [*lines, ""]


def _errors(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["## Relative error in o against float64", "", "| operator | arm | error |", "|---|---|---|"]
    return [*lines, *(f"| {r['operator']} | {name} | {e:.2e} |" for r in rows for name, e in r["errors"].items()), ""]


TABLES = {
    "kda": lambda rows: _linear("KDA prefill", rows),
    "gdn": lambda rows: _linear("GDN prefill", rows),
    "lightning": lambda rows: _linear("Lightning prefill", rows),
    "errors": _errors,
    "attention": _attention,
    "kv_pack": _kv_pack,
}


def as_markdown(sections: dict[str, Any]) -> str:
    """Tables of all figures, with versions and errors; a smoke run says in its title that it shows no speed."""
    smoke = " (smoke run on a CPU: control flow only, the times mean nothing)" if sections.get("smoke") else ""
    versions = sections.get("versions", {})
    lines = [f"# Kernels on one {versions.get('gpu', 'device')}{smoke}", ""]
    lines += [f"- {key}: {value}" for key, value in versions.items()]
    if "copy_rate_bytes_per_s" in sections:
        lines.append(f"- device copy: {sections['copy_rate_bytes_per_s'] / 1e12:.3f} TB/s")
    checks = sections.get("checks", [])
    lines.append(f"- checks: {sum(row['green'] for row in checks)} of {len(checks)} green")
    lines += [f"- fla-core ran {what}" for what in sections.get("fla_dispatched", [])]
    lines += ["", "Share of the floor: inputs read once and output written once at the copy rate, over our time.", ""]
    if sections.get("failures"):
        lines += ["## Not measured", "", *(f"- {what}" for what in sections["failures"]), ""]
    for name, table in TABLES.items():
        if sections.get(name):
            lines += table(sections[name])
    if sections.get("tuning"):
        lines += ["## Tuning", "", *(f"- {row}" for row in sections["tuning"])]
    return "\n".join(lines) + "\n"
