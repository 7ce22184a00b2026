"""docs/reproduction.md from the results."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.scheduler import replay, role_shift
from sglang_prfaas.scheduler import paper, planner
from sglang_prfaas.scheduler.lengths import nodes
from sglang_prfaas.scheduler.solver import over_roles, over_thresholds, solve
from sglang_prfaas.scheduler.throughput import pd_p_bound
from sglang_prfaas.scheduler.ttft import with_queue_and_transfer

_HEAD = """# Reproduction of the paper

Prefill-as-a-Service (PrfaaS), arXiv 2604.15039v2. This file is written by

```
python -m benchmarks.scheduler --json OUT --trace conversation_trace.jsonl --markdown docs/reproduction.md
```

The trace is kvcache-ai/Mooncake's conversation trace (FAST'25 release). Without `--trace` its section is left out;
`--only-trace` replays it alone, and keeps the rest of an earlier `OUT`.
`python -m sglang_prfaas.launch plan --paper` prints the first table alone.

What the model rests on: Table 5 for the H200 (quadratic least squares over the prefill times; 16.875 KiB for each token
and 173.9 MiB of state, derived from the 1K and 8K rows); an H20 curve and a decode rate that the paper does not print
and that we derived from Table 6. So the H20 columns of Table 6 are consistent by construction, not confirmed.
"""


def markdown(rows: list[planner.Compared], results: dict[str, Any]) -> str:
    """The whole file."""
    parts = [_HEAD, "## Figures of the paper beside the model's\n", _compared(rows), _table3(), _figure_5(), _ttft()]
    parts.append(_case_study(results["case_study"], results["case_study_s"]))
    parts.append(_roles(results["roles"]))
    if "trace" in results:
        parts.append(_trace(results["trace"]))
    parts.append(_speed(results))
    return "\n".join(parts)


def _rows(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*text, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def _compared(rows: list[planner.Compared]) -> str:
    lines = [
        (
            row.where,
            row.figure,
            f"{row.paper:g}",
            f"{row.ours:.4g}" if row.ours < 10_000 else f"{row.ours:.0f}",
            row.unit,
            f"{row.difference:+.3f}" if row.absolute else f"{row.difference:+.1%}",
        )
        for row in rows
    ]
    return _rows(("where", "figure", "paper", "ours", "unit", "difference"), lines)


_TABLE3 = """## Table 3

The paper prints KV throughput; sizes follow from each model's configuration (bf16 cache, float32 state). Their quotient
(eq. 1) is the prefill time that both imply: about half a second or less at 1K, then rising.
"""

_TTFT = """## TTFT with queue and transfer

The paper's TTFT (2.22 s mean, 3.51 s P90) is prefill alone. At t = 19.4K and 3/5, with M/G/k queues, the exposed
transfer and 20 ms of round trip, by the share of Lambda_max:
"""

_CASE_STUDY = """## The case study, simulated

Poisson arrivals, queues, transfers and decode places. Sustained is the highest rate at which P90 TTFT stays within
twice its value without load and at least 98.5 % of the arrivals have their first token within the run, so that no
policy can let requests pile up. Every policy is routed by `scheduler.decide`. {seconds:.0f} s of arrivals, three seeds.

The bars that we set ourselves: 1.54 to homogeneous and 1.30 to naive, 1.60 to homogeneous with shared roles.
Homogeneous and naive serve in order of arrival, as SGLang does by default.

What gives what:

- The threshold that moves with the queues (`scheduler.threshold`): from "static" to "live, in order of arrival".
- The order of waiting requests, and paths that help each other (`scheduler.dispatch`): from there to "live". Requests
  wait in front of the servers; those that can still make twice the unloaded P90 go first, in order of arrival, but for
  the longest ones where not all can make it; an idle path takes requests of the other. It has a price, in the last
  columns: the longest prompts wait longer than in order of arrival.
- In the long run prefill at 3/5 has time for {limit:.2f} requests a second in any order, and for {limit_base:.2f} in
  the homogeneous cluster at 9/3: the mean of the prefill times over the lengths, where eq. 3 and 4 take the
  prefill time of the mean length.
- The sustained rate of "live" is there: in a longer run the longest prompts would wait longer still. The rows
  "at ... times" have the figures at the bars, where there is room to spare.
- Shared roles: one PD instance prefills and decodes, and a decode step is taken to cost in proportion to its batch.

The router has both: "live" with `policy.order = "ordered"`, which is what a live policy does by default, and "live, in
order of arrival" with `"off"` ([router.md](router.md)).
"""

_ROLES = """## Roles that change

An hour of the case study's traffic at {rate:g} requests a second, an hour of short prompts with {output} tokens of
output at {heavy_rate:g}, and an hour as the first. `scheduler.long_term` looks once a minute; a switch drains the
server and takes 20 s then.
"""

_TRACE = """## The conversation trace, and what happens to it

{requests} requests: the trace {fleets} times at once (each shifted by its part of the hour, with prompts of its own)
over {fleets} times the case study's fleet at 3/5, with one link of 100 Gbps and a prefix cache in either site. Times
are spread over the 3 s that the trace rounds to. One rule sets the load of everything below: {sustained_speed:g} times
the trace's speed is the highest, in steps of 0.1, at which the best static threshold keeps P90 TTFT within twice its
value without load; we run at 0.8 of that, {time_scale:g}. {fleets} is the least multiple of the fleet that puts more on
the link than the drop leaves ({egress:.1f} Gbps; the case study's own fleet sends about half of that). Every event
begins at {positions} of the trace.

"static" is the best of t = {thresholds} by P90 TTFT in just the part that the line is
about, found with hindsight, in order of arrival. "live" knows nothing before it happens. "event": all requests that
arrived in the event and the minute after it, however late they were served, and first tokens in that time; every
request is served in the end. The constants of the live policy were chosen on this trace.
"""

_EVENTS = """\
Live to static, medians over the positions of each figure's ratio:
"""

_EVENTS_END = """\
Who pays: in a burst there is more work than time, and what one waits less, another waits more. The longest prompts go
last (`scheduler.overload`), so P99 is later than in order of arrival. While the link is slow, live keeps most prompts
at home: all of them wait a little, where a static threshold leaves those of the link behind. That can be less than a
tenth of all requests, which P90 over the whole trace does not see; its mean and P99 do.

Load and fleet were settled after runs at others. Where more of the load needs the link, live is not better when it
drops: with three fleets (27 Gbps before it) an earlier version of this order had a P90 of 191 s in the event where
static 6000 had 194 s, and 29 s over the whole trace against 4 s.
"""


def _table3() -> str:
    lines = [
        (cell.model, f"{cell.length_k}K", f"{cell.kv_gbps:g}", f"{cell.kv_mib:.0f}", f"{cell.implied_prefill_s:.2f}")
        for cell in planner.table3()
    ]
    header = ("model", "length", "Gbps (paper)", "KVCache MiB (ours)", "implied prefill s")
    return f"{_TABLE3}\n" + _rows(header, lines)


def _figure_5() -> str:
    fleet, workload = paper.case_study_fleet(), paper.case_study_workload()
    roles = [
        (f"{point.n_p:.0f} / {point.n_d:.0f}", f"{point.lambda_max:.3f}", point.binding)
        for point in over_roles(fleet, workload, 19_400)
    ]
    bounds = over_thresholds(fleet, workload, 3, 100.0)
    chosen = [5_000, 10_000, 15_000, 19_400, 25_000, 30_000, 40_000]
    lines = []
    for t in chosen:
        index = int(abs(bounds.t - t).argmin())
        far, near = float(bounds.prfaas_bound[index]), float(pd_p_bound(bounds, 3)[index])
        lines.append((f"{t}", f"{far:.3f}", f"{near:.3f}", f"{min(far, near):.3f}"))
    return (
        "## Figure 5\n\n5a, Lambda over the roles at t = 19.4K; the paper's peak is at N_p = 3.\n\n"
        + _rows(("N_p / N_d", "Lambda_max", "binds"), roles)
        + "\n5b, both bounds over t at 3/5; the paper's cross at 19.4K and 3.24.\n\n"
        + _rows(("t", "Theta_prfaas / p", "Theta_pd-p / (1 - p)", "lower"), lines)
    )


def _ttft() -> str:
    fleet, workload, lines = paper.case_study_fleet(), paper.case_study_workload(), []
    best = solve(fleet, workload)
    for load in (0.0, 0.5, 0.7, 0.8, 0.9):
        found = with_queue_and_transfer(
            fleet, workload, t_tokens=best.t_tokens, n_p=3, rate=max(1e-9, best.lambda_max * load), rtt_s=0.02
        )
        lines.append((f"{load:.0%}", f"{found.mean_s:.2f}", f"{found.p90_s:.2f}", f"{found.queue_mean_s:.2f}",
                      f"{found.transfer_mean_s * 1e3:.0f}"))  # fmt: skip
    return f"{_TTFT}\n" + _rows(("load", "TTFT mean s", "P90 s", "queue s", "transfer ms"), lines)


def _case_study(rows: list[dict[str, Any]], seconds: float) -> str:
    lines = [
        (
            row["name"],
            f"{row['rate']:.2f}",
            f"{row['to_homogeneous']:.3f}",
            f"{row['to_naive']:.3f}",
            f"{row['unloaded_p90_s']:.2f}",
            *(f"{row[key]:.2f}" for key in ("p90_s", "mean_s", "p99_s")),
            f"{row['max_s']:.0f}",
            f"{row['offloaded_share']:.1%}",
        )
        for row in rows
    ]
    header = (
        "policy",
        "req/s",
        "to homogeneous",
        "to naive",
        "P90 unloaded s",
        "P90 s",
        "mean s",
        "P99 s",
        "max s",
        "offloaded",
    )
    text = _CASE_STUDY.format(seconds=seconds, **_limits())
    return f"{text}\n" + _rows(header, lines)


def _limits() -> dict[str, float]:
    """Rates at which prefill is busy all the time, over the lengths instead of their mean."""
    fleet, lengths = paper.case_study_fleet(), nodes(paper.CASE_STUDY_LENGTHS)
    assert fleet.prfaas_prefill is not None
    near_s = np.cumsum(fleet.pd_prefill.time_s.over(lengths)) / 3 / len(lengths)
    far_s = np.cumsum(fleet.prfaas_prefill.time_s.over(lengths)[::-1])[::-1] / fleet.n_prfaas / len(lengths)
    return {"limit": float(1 / np.maximum(near_s, far_s).min()), "limit_base": 9 / 3 / float(near_s[-1])}


def _roles(found: dict[str, Any]) -> str:
    lines = [
        (label, f"{phase}", *(f"{run[key]:.2f}" for key in ("throughput", "ttft_mean_s", "ttft_p90_s", "ttft_p99_s")),
         f"{run['failed']}")
        for label, runs in found["runs"].items()
        for phase, run in enumerate(runs, 1)
    ]  # fmt: skip
    changes = [
        (f"{change['at_s']:.0f}", f"{change['server']} to {change['role']}", f"{change['done_s'] - change['at_s']:.0f}",
         change["reason"])
        for change in found["changes"]
    ]  # fmt: skip
    head = _ROLES.format(
        rate=role_shift.RATE, heavy_rate=role_shift.DECODE_HEAVY_RATE, output=role_shift.DECODE_HEAVY_OUTPUT
    )
    figures = _rows(("roles", "hour", "req/s", "TTFT mean s", "P90", "P99", "failed"), lines)
    return f"{head}\n{figures}\n" + _rows(("at s", "change", "took s", "why"), changes)


def _trace(found: dict[str, Any]) -> str:
    lines, ratios = [], []
    for name, entries in found["scenarios"].items():
        for part in ("whole", "event"):
            if part not in entries[0]:
                continue
            for entry in entries:
                for label in ("best_static", "live"):
                    of = entry[part]
                    who = "live" if label == "live" else f"static {of['best_static_t']}"
                    lines.append((name, part, f"{entry['start_s']:.0f}", who, *_figures(of[label])))
            ratios.append((name, part, *(f"{replay.ratio(entries, part, key):.3f}" for key in _RATIOS)))
    head = _TRACE.format(
        **found,
        egress=found["scenarios"][replay.PLAIN][0]["whole"]["best_static"]["egress_gbps"],
        positions=", ".join(f"{position:g}" for position in replay.POSITIONS),
        thresholds=", ".join(map(str, replay.THRESHOLDS)),
    )
    header = (
        "scenario",
        "part",
        "at s",
        "policy",
        "mean s",
        "P50",
        "P90",
        "P99",
        "req/s",
        "Gbps",
        "offloaded",
        "failed",
    )
    names = ("scenario", "part", "P50", "P90", "P99", "mean", "throughput")
    return f"{head}\n{_EVENTS}\n{_rows(names, ratios)}\n{_EVENTS_END}\n{_rows(header, lines)}"


_RATIOS = ("ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "ttft_mean_s", "throughput")


def _figures(run: dict[str, Any]) -> tuple[str, ...]:
    times = (f"{run[key]:.2f}" for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s"))
    return (*times, f"{run['throughput']:.3f}", f"{run['egress_gbps']:.1f}", f"{run['offloaded_share']:.1%}",
            f"{run['failed']}")  # fmt: skip


_SPEEDS = (
    # key, what, format, factor, bar
    ("decision_us", "a decision with a given t, 16 sites and 1,000 servers", "{:.0f} us", 1.0, "50 us"),
    ("live_decision_100_servers_us", "a live decision, 2 sites and 100 servers", "{:.0f} us", 1.0, "50 us"),
    (
        "live_decision_16_sites_1000_servers_us",
        "a live decision, 8 PrfaaS and 8 PD sites, 64 links and 1,000 servers",
        "{:.0f} us",
        1.0,
        "50 us",
    ),
    (
        "live_look_16_sites_1000_servers_us",
        "a look at those servers and links, at most every 98 ms",
        "{:.0f} us",
        1.0,
        "-",
    ),
    ("dispatch_us", "the next of 50 waiting requests", "{:.0f} us", 1.0, "-"),
    ("ahead_of_10_us", "what goes before a new request, 10 waiting", "{:.1f} us", 1.0, "-"),
    ("ahead_of_10000_us", "the same, 10,000 waiting", "{:.1f} us", 1.0, "-"),
    ("threshold_us", "an update of the live threshold", "{:.0f} us", 1.0, "-"),
    ("solver_10000_gpus_s", "solver, 10,000 GPUs", "{:.1f} ms", 1e3, "1 s"),
    ("solver_shared_10000_gpus_s", "solver with shared roles, 10,000 GPUs", "{:.1f} ms", 1e3, "1 s"),
)


def _speed(results: dict[str, Any]) -> str:
    """Figures that were not measured are left out."""
    found, machine = results["speed"], results["machine"]
    lines = [(what, text.format(found[key] * by), bar) for key, what, text, by, bar in _SPEEDS if key in found]
    head = f"## Speed\n\nMedians, {machine['cores']} cores ({machine['cpu']}), Python {results['python']}.\n\n"
    return head + _rows(("what", "median", "bar"), lines)
