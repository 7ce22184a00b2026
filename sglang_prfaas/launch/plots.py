"""PNG plots. matplotlib is optional and imported when a plot is asked for."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from sglang_prfaas.errors import ConfigError
from sglang_prfaas.scheduler.solver import over_roles, over_thresholds
from sglang_prfaas.scheduler.throughput import Fleet, Workload, pd_p_bound


def _pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only. Raises ConfigError where it is not installed."""
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'sglang-prfaas[plots]'") from error


def figure_5(folder: Path, fleet: Fleet, workload: Workload, t_tokens: float, n_p: int) -> list[Path]:
    """Lambda over N_p at a fixed t (Figure 5a), and both prefill bounds over t at fixed roles (Figure 5b)."""
    if not fleet.n_prfaas:
        raise ConfigError("--plot needs a PrfaaS site: there is no threshold without one")
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    points = over_roles(fleet, workload, t_tokens)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([point.n_p for point in points], [point.lambda_max for point in points], marker="o")
    axes.set(xlabel="N_p", ylabel="Lambda_max (req/s)", title=f"t = {t_tokens:.0f} tokens")
    roles = _save(figure, folder / "figure_5a.png")

    bounds = over_thresholds(fleet, workload, n_p)
    inner = slice(1, -1)
    top = 2 * min(float(np.max(np.minimum(bounds.prfaas_bound, pd_p_bound(bounds, n_p)))), 1e9)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(bounds.t[inner] / 1000, bounds.prfaas_bound[inner], label="Theta_prfaas / p")
    axes.plot(bounds.t[inner] / 1000, pd_p_bound(bounds, n_p)[inner], label="Theta_pd-p / (1 - p)")
    axes.axvline(t_tokens / 1000, linestyle=":", color="grey")
    axes.set(xlabel="t (K tokens)", ylabel="req/s", ylim=(0, top), title=f"N_p = {n_p}")
    axes.legend()
    return [roles, _save(figure, folder / "figure_5b.png")]


def over_time(folder: Path, name: str, columns: dict[str, list[Any]]) -> Path:
    """Threshold, queues, egress, roles and TTFT of one simulated run."""
    pyplot = _pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    panels = (
        ("t (tokens)", ("t_tokens",)),
        ("queued", ("prfaas_queue", "local_queue", "decode_waiting")),
        ("Gbps", ("egress_gbps", "link_gbps")),
        ("servers", ("prfaas_alive", "prefill_servers", "decode_servers")),
        ("TTFT mean (s)", ("ttft_mean_s",)),
    )
    figure, rows = pyplot.subplots(len(panels), 1, sharex=True, figsize=(8, 2 * len(panels)))
    for axes, (label, names) in zip(rows, panels, strict=True):
        for column in names:
            values = [float("nan") if value is None else value for value in columns[column]]
            if column == "t_tokens":
                values = [min(value, 131_072) for value in values]
            axes.plot(columns["at_s"], values, label=column)
        axes.set_ylabel(label)
        axes.legend(loc="upper right", fontsize="small")
    rows[-1].set_xlabel("s")
    return _save(figure, folder / f"{name}.png")


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    _pyplot().close(figure)
    return path
