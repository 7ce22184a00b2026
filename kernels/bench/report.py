"""The report in Markdown."""

from __future__ import annotations

from typing import Any


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


def as_markdown(report: dict[str, Any]) -> str:
    """Tables of all figures, with versions and errors; a smoke run says in its title that it shows no speed."""
    smoke = " (smoke run on a CPU: control flow only, the times mean nothing)" if report["smoke"] else ""
    lines = [f"# Kernels on one {report['versions']['gpu']}{smoke}", ""]
    lines += [f"- {key}: {value}" for key, value in report["versions"].items()]
    lines += [f"- device copy: {report['copy_rate_bytes_per_s'] / 1e12:.3f} TB/s", ""]
    lines += ["Share of the floor: inputs read once and output written once at the copy rate, over our time.", ""]
    lines += _linear("KDA prefill", report["kda"])
    lines += _linear("GDN prefill", report["gdn"])
    lines += ["## Relative error in o against float64", "", "| operator | arm | error |", "|---|---|---|"]
    lines += [f"| {r['operator']} | {name} | {e:.2e} |" for r in report["errors"] for name, e in r["errors"].items()]
    lines += ["", "## Prefill attention", "", "| case | arm | median ms | TFLOP/s |", "|---|---|---|---|"]
    for row in report["attention"]:
        for name, t in row["times"].items():
            lines.append(f"| {row['name']} | {name} | {t['median_ms']:.3f} | {row['tflops'][name]:.1f} |")
    lines += ["", *(f"- took no part: {why}" for row in report["attention"] for why in row["absent"]), ""]
    lines += ["## KV pack", "", "| launch | ms | MB moved | of the copy rate |", "|---|---|---|---|"]
    for row in report["kv_pack"]:
        lines.append(
            f"| {row['name']} | {row['ms']:.3f} | {row['bytes'] / 1e6:.1f} | {row['share_of_copy_rate']:.2f} |"
        )
    if "tuning" in report:
        lines += ["", "## Tuning", "", *(f"- {row}" for row in report["tuning"])]
    return "\n".join(lines) + "\n"
