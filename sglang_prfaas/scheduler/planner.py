"""Plans: what a mix of roles gives, and what it costs. And the paper's tables beside the model's values."""

from __future__ import annotations

from msgspec import Struct

from sglang_prfaas.core.kv_layout import layout_of
from sglang_prfaas.core.table1_models import TABLE1_CONFIGS
from sglang_prfaas.core.units import MIB, gbps_to_bytes_per_s
from sglang_prfaas.scheduler import paper
from sglang_prfaas.scheduler.solver import solve, solve_naive, solve_shared
from sglang_prfaas.scheduler.throughput import (
    Fleet,
    Throughput,
    Workload,
    cluster_egress_gbps,
    kv_throughput_gbps,
)
from sglang_prfaas.scheduler.ttft import Ttft, prefill_only, with_queue_and_transfer


class Prices(Struct, frozen=True):
    """Price of one GPU for one hour, in any currency."""

    prfaas: float
    pd: float


class Plan(Struct, frozen=True, kw_only=True):
    """One mix of roles and what it gives, at `rate` requests a second."""

    solution: Throughput
    rate: float
    ttft_prefill_only: Ttft
    ttft: Ttft
    egress_gbps: float
    cost_per_hour: float
    cost_per_million_tokens: float
    """Input and output tokens, at `rate`."""


def plan(
    fleet: Fleet, workload: Workload, solution: Throughput, *, load: float, prices: Prices, rtt_s: float = 0.0
) -> Plan:
    """What a solution gives at the share `load` of its Lambda_max."""
    rate = solution.lambda_max * load
    prfaas_gpus = fleet.n_prfaas * (fleet.prfaas_prefill.gpus if fleet.prfaas_prefill else 0)
    cost_per_hour = prfaas_gpus * prices.prfaas + fleet.n_pd * fleet.pd_prefill.gpus * prices.pd
    tokens_per_hour = 3600 * rate * (workload.lengths.mean + workload.output_tokens)
    return Plan(
        solution=solution,
        rate=rate,
        ttft_prefill_only=prefill_only(fleet, workload, solution.t_tokens),
        ttft=with_queue_and_transfer(
            fleet, workload, t_tokens=solution.t_tokens, n_p=solution.n_p, rate=rate, rtt_s=rtt_s
        ),
        egress_gbps=solution.egress_gbps * load,
        cost_per_hour=cost_per_hour,
        cost_per_million_tokens=cost_per_hour / tokens_per_hour * 1e6,
    )


class Compared(Struct, frozen=True):
    """One figure of the paper and ours. `tolerance`: relative, or absolute for shares and role counts."""

    where: str
    figure: str
    paper: float
    ours: float
    unit: str
    tolerance: float
    absolute: bool = False

    @property
    def difference(self) -> float:
        """Ours minus the paper's, relative unless `absolute`."""
        return self.ours - self.paper if self.absolute else self.ours / self.paper - 1

    @property
    def within(self) -> bool:
        return abs(self.difference) <= self.tolerance


def solutions() -> dict[str, Throughput]:
    """The columns of Table 6, and the best mix with shared roles."""
    workload, fleet, base = paper.case_study_workload(), paper.case_study_fleet(), paper.homogeneous_fleet()
    return {
        "prfaas": solve(fleet, workload),
        "homogeneous": solve(base, workload),
        "naive": solve_naive(fleet, workload),
        "prfaas_shared": solve_shared(fleet, workload),
    }


def compare_table6() -> list[Compared]:
    """Table 6 and the text of section 4 beside the model's values."""
    workload, solved, rows = paper.case_study_workload(), solutions(), []
    base = solved["homogeneous"].lambda_max
    for name, column in paper.TABLE6.items():
        ours = solved[name]
        fleet = paper.homogeneous_fleet() if name == "homogeneous" else paper.case_study_fleet()
        ttft = prefill_only(fleet, workload, ours.t_tokens)
        where = f"Table 6, {name}"
        if column.t_tokens is not None:
            rows.append(Compared(where, "t", column.t_tokens, ours.t_tokens, "tokens", 0.01))
        for figure, printed, own in (("N_p", column.n_p, ours.n_p), ("N_d", column.n_d, ours.n_d)):
            rows.append(Compared(where, figure, printed, own, "instances", 0, absolute=True))
        rates = (
            ("Theta_prfaas", column.theta_prfaas, ours.theta_prfaas, 0.02),
            ("Theta_pd-p", column.theta_pd_p, ours.theta_pd_p, 0.02),
            ("Theta_pd-d", column.theta_pd_d, ours.theta_pd_d, 0.02),
            ("Lambda_max", column.lambda_max, ours.lambda_max, 0.01),
        )
        rows += [Compared(where, figure, a, b, "req/s", limit) for figure, a, b, limit in rates if a is not None]
        rows.append(Compared(where, "ratio", column.ratio, ours.lambda_max / base, "x", 0.02))
        rows.append(Compared(where, "TTFT mean (prefill only)", column.ttft_mean_s, ttft.mean_s, "s", 0.05))
        rows.append(Compared(where, "TTFT P90 (prefill only)", column.ttft_p90_s, ttft.p90_s, "s", 0.05))
    best = solved["prfaas"]
    rows.append(Compared("Section 4", "offloaded share", paper.OFFLOADED_SHARE, best.p, "", 0.01, absolute=True))
    rows.append(Compared("Section 4", "egress", paper.EGRESS_GBPS, best.egress_gbps, "Gbps", 0.08))
    same_money = solve(paper.homogeneous_fleet(_equal_cost_instances()), workload).lambda_max
    rows.append(Compared("Section 1", "gain at equal cost", 1.15, best.lambda_max / same_money, "x", 0.02))
    return rows


def compare_section_2_3() -> list[Compared]:
    """The bandwidths that whole prefill clusters need, eq. 2 over Table 3."""
    return [
        Compared(
            "Section 2.3",
            f"{entry.model}, {entry.gpus} GPUs, {entry.length_k}K",
            entry.gbps,
            cluster_egress_gbps(
                entry.gpus, 8, paper.TABLE3_GBPS[entry.model][paper.TABLE3_LENGTHS.index(entry.length_k)]
            ),
            "Gbps",
            0.03,
        )
        for entry in paper.SECTION_2_3
    ]


def compare_table5() -> list[Compared]:
    """Table 5: sizes of the layout, times of the fitted curve, and eq. 1 over both."""
    profile, rows = paper.PAPER_PROFILE, []
    curve = profile.prefill["H200"].time_s
    for row in paper.TABLE5:
        size, seconds = profile.kv.size_bytes(row.tokens), curve.at(row.tokens)
        where = f"Table 5, {row.tokens // 1000}K"
        rows.append(Compared(where, "KVCache", row.kv_mib, size / MIB, "MiB", 0.02))
        rows.append(Compared(where, "prefill", row.prefill_s, seconds, "s", 0.05))
        rows.append(Compared(where, "KV throughput", row.kv_gbps, kv_throughput_gbps(size, seconds), "Gbps", 0.05))
    return rows


class Table3Entry(Struct, frozen=True):
    """A cell of Table 3 with the size from the model's configuration; eq. 1 then gives the prefill time."""

    model: str
    length_k: int
    kv_gbps: float
    kv_mib: float
    implied_prefill_s: float


def table3() -> list[Table3Entry]:
    """Table 3 beside what follows from the configurations."""
    found = []
    for model, row in paper.TABLE3_GBPS.items():
        layout = layout_of(TABLE1_CONFIGS[model])
        for length_k, gbps in zip(paper.TABLE3_LENGTHS, row, strict=True):
            size = layout.size_bytes(length_k * 1000)
            found.append(Table3Entry(model, length_k, gbps, size / MIB, size / gbps_to_bytes_per_s(gbps)))
    return found


def _equal_cost_instances() -> int:
    return round(paper.N_PRFAAS * paper.H200_PRICE) + paper.N_PD
