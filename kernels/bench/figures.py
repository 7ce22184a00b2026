"""What is measured of linear attention: rows of figures for each operator, plain values for JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from arms import OURS, Case, kda_ours, lightning_qkv, lightning_slopes, make_case
from checks import gdn_truth, kda_truth, relative_error
from prfaas_kernels.common.tuning import DEFAULT
from prfaas_kernels.lightning import recurrent_lightning
from rivals import brief, rivals
from timing import Arm, as_graph, measure

WIDTH = 128
#: Operator -> bytes per token and head that any implementation must move: q, k, v in and o out in bfloat16; KDA's gate
#: and beta in bfloat16, GDN's in float32, one of each for a head.
FLOOR_BYTES = {"kda": 5 * 2 * WIDTH + 2, "gdn": 4 * 2 * WIDTH + 8, "lightning": 4 * 2 * WIDTH}
#: Ours may err by this factor more than fla-core.
ERROR_RATIO = 1.2
AXES = {
    "scan_block": (16, 32, 64),
    "scan_warps": (4, 8),
    "scan_stages": (1, 2, 3),
    "prep_block": (32, 64, 128),
    "prep_warps": (4, 8),
    "prep_max_registers": (128, 168, 255),
    "solve_warps": (4, 8),
    "merge_warps": (4, 8),
    "segment_programs": (1, 2),
}
#: Axes that matter only where the scan runs in segments.
SEGMENT_AXES = ("merge_warps", "segment_programs")


class Shape(NamedTuple):
    """``sequences``: 1, 8, or "ragged": one of half the tokens, the rest in uneven parts."""

    tokens: int
    heads: int
    sequences: int | str

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if isinstance(self.sequences, int):
            return [self.tokens // self.sequences] * self.sequences
        parts = [self.tokens // 2, self.tokens // 4 + 17, self.tokens // 8 - 5, 1]
        return [*parts, self.tokens - sum(parts)]


class Budget(NamedTuple):
    """Where and how long: ``device``, warm-ups and iterations of each arm, channels of a head."""

    device: str
    warmups: int
    iterations: int
    width: int = WIDTH


FULL = [Shape(t, h, n) for t in (2048, 8192, 32768, 131072) for h in (4, 8, 16, 32) for n in (1, 8, "ragged")]
QUICK = [
    Shape(8192, 32, 1),
    Shape(32768, 32, 1),
    Shape(131072, 32, 1),
    Shape(8192, 32, "ragged"),
    Shape(32768, 8, 1),
    Shape(131072, 4, 1),
]
#: Of GDN and Lightning, which share all but their prep with KDA.
QUICK_SCALAR = [Shape(8192, 32, 1), Shape(32768, 32, 1)]
SMOKE = [Shape(200, 2, 1), Shape(300, 1, "ragged")]


def _row(shape: Shape, floor_bytes: int, arms: list[Arm], copy_rate: float, budget: Budget) -> dict[str, Any]:
    times = measure(arms, device=budget.device, warmups=budget.warmups, iterations=budget.iterations)
    own = times[arms[0].name].median_ms
    return {
        **shape._asdict(),
        "times": {name: value._asdict() for name, value in times.items()},
        "ratio_to_ours": {name: value.median_ms / own for name, value in times.items()},
        "share_of_floor": shape.tokens * shape.heads * floor_bytes / copy_rate * 1e3 / own,
    }


def _with_graph(arm: Arm, budget: Budget) -> list[Arm]:
    return [arm, as_graph(arm)] if budget.device == "cuda" else [arm]


def linear_row(operator: str, shape: Shape, copy_rate: float, budget: Budget) -> dict[str, Any]:
    """An operator at one shape: times of each arm, ratio to ours, share of the floor; who took no part, and why."""
    case = make_case(shape.tokens, shape.heads, shape.lengths(), budget.device, budget.width)
    others, absent = rivals(operator, case)
    serial = [kda_ours(case, segment_chunks=0)] if operator == "kda" else []
    arms = [*_with_graph(OURS[operator](case), budget), *serial, *others]
    return {"operator": operator, **_row(shape, FLOOR_BYTES[operator], arms, copy_rate, budget), "absent": absent}


def _truth(operator: str, case: Case) -> torch.Tensor:
    """o ``[T, H, V]`` in float64."""
    if operator == "kda":
        return kda_truth(case.x, case.cu, case.initial, None)[0]
    if operator == "gdn":
        return gdn_truth(case.x, case.cu, case.initial)[0]
    slopes = lightning_slopes(case)
    return recurrent_lightning(*lightning_qkv(case), slopes, initial_state=case.initial, cu_seqlens=case.cu)[0]


def error_row(operator: str, budget: Budget, tokens: int = 2048, heads: int = 2) -> dict[str, Any]:
    """Relative error in o of each arm against float64; ours is red where it is over 1.2 times fla-core's."""
    case = make_case(tokens, heads, [tokens], budget.device, budget.width)
    want, mine = _truth(operator, case), OURS[operator](case)
    others, _ = rivals(operator, case)
    errors = {}
    for arm in (mine, *others):
        arm.restore()
        result: Any = arm.run()
        errors[arm.name] = relative_error(result[0][0], want)
    limits = [value * ERROR_RATIO for name, value in errors.items() if name.startswith("fla-core")]
    return {"operator": operator, "errors": errors, "green": errors[mine.name] <= min([1e-2, *limits])}


def tune_rows(axis: str, budget: Budget, *, smoke: bool) -> list[dict[str, Any]]:
    """Times of one setting's values on copies of the state, best first; a value that can't be compiled says why."""
    shape = Shape(131072, 4, 1) if axis in SEGMENT_AXES else Shape(8192, 32, 1)
    case: Case = make_case(
        *((200, 1, [200]) if smoke else (shape.tokens, shape.heads, shape.lengths())), budget.device, budget.width
    )
    rows = []
    for value in AXES[axis]:
        arm = kda_ours(case, DEFAULT._replace(**{axis: value}))
        try:
            times = measure([arm], device=budget.device, warmups=min(5, budget.warmups), iterations=30)
            rows.append({axis: value, "ms": times[arm.name].median_ms})
        except Exception as error:  # noqa: BLE001  (out of shared memory or registers: part of the report)
            rows.append({axis: value, "ms": None, "error": brief(error)})
    return sorted(rows, key=lambda row: (row["ms"] is None, row["ms"] or 0.0))
