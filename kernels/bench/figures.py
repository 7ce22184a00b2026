"""What is measured: rows of figures for each operator, plain values for JSON."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from arms import Case, brief, gdn_ours, kda_ours, make_case, rivals
from checks import gdn_truth, kda_truth, relative_error
from prfaas_kernels.common.tuning import DEFAULT
from prfaas_kernels.full_attention import prefill_attention
from prfaas_kernels.kv_pack import PoolTable, dequantise_rows, pack_rows, quantise_rows, unpack_rows
from timing import Arm, as_graph, measure

WIDTH = 128
#: q, k, v, g in and o out in bfloat16, beta: bytes per token and head that any implementation must move.
KDA_FLOOR_BYTES = 5 * 2 * WIDTH + 2
#: GDN has one float32 gate and one float32 beta for each head.
GDN_FLOOR_BYTES = 4 * 2 * WIDTH + 8
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
QUICK_GDN = [Shape(8192, 32, 1), Shape(32768, 32, 1)]
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
    """KDA or GDN at one shape: times of each arm, ratio to ours, share of the floor; who took no part, and why."""
    case = make_case(shape.tokens, shape.heads, shape.lengths(), budget.device, budget.width)
    mine = [kda_ours(case), kda_ours(case, segment_chunks=0)] if operator == "kda" else [gdn_ours(case)]
    others, absent = rivals(operator, case)
    floor_bytes = KDA_FLOOR_BYTES if operator == "kda" else GDN_FLOOR_BYTES
    arms = [*_with_graph(mine[0], budget), *mine[1:], *others]
    return {"operator": operator, **_row(shape, floor_bytes, arms, copy_rate, budget), "absent": absent}


def error_rows(budget: Budget, tokens: int = 2048, heads: int = 2) -> list[dict[str, Any]]:
    """Relative error in o of each arm against float64; ours is red where it is over 1.2 times fla-core's."""
    rows = []
    for operator in ("kda", "gdn"):
        case = make_case(tokens, heads, [tokens], budget.device, budget.width)
        if operator == "kda":
            want, _ = kda_truth(case.x, case.cu, case.initial, None)
            mine = kda_ours(case)
        else:
            want, _ = gdn_truth(case.x, case.cu, case.initial)
            mine = gdn_ours(case)
        others, _ = rivals(operator, case)
        errors = {}
        for arm in (mine, *others):
            arm.restore()
            result: Any = arm.run()
            errors[arm.name] = relative_error(result[0][0], want)
        limits = [value * ERROR_RATIO for name, value in errors.items() if name.startswith("fla-core")]
        rows.append({"operator": operator, "errors": errors, "green": errors[mine.name] <= min([1e-2, *limits])})
    return rows


def attention_rows(budget: Budget, *, smoke: bool) -> list[dict[str, Any]]:
    """Prefill attention: GQA without prefix against torch's fused kernels, absorbed MLA over a paged prefix alone."""
    rows, bf16 = [], torch.bfloat16
    tokens, heads, key_heads, width = (70, 4, 2, 32) if smoke else (8192, 32, 8, 128)
    q = torch.randn(tokens, heads, width, device=budget.device, dtype=bf16)
    k, v = (torch.randn(tokens, key_heads, width, device=budget.device, dtype=bf16) for _ in range(2))
    cu = torch.tensor([0, tokens], dtype=torch.int32, device=budget.device)
    batched = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    arms = [
        Arm("prfaas", lambda: prefill_attention(q, k, v, cu_seqlens=cu)),
        Arm(
            "torch sdpa",
            lambda: torch.nn.functional.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True),
        ),
    ]
    try:
        from sgl_kernel.flash_attn import flash_attn_varlen_func

        arms.append(Arm("sglang fa3", lambda: flash_attn_varlen_func(q, k, v, cu, cu, tokens, tokens, causal=True)))
        absent = []
    except ImportError as error:
        absent = [f"sglang's fa3 can't be imported ({brief(error)})"]
    flops = 2 * tokens * tokens * heads * width
    rows.append(
        {"name": f"GQA {heads}/{key_heads} heads, {tokens} tokens", "absent": absent, "flops": flops, "arms": arms}
    )

    new, prefix, heads, latent, rotary, page = (20, 70, 4, 32, 16, 16) if smoke else (1024, 32768, 16, 512, 64, 64)
    queries = torch.randn(new, heads, latent + rotary, device=budget.device, dtype=bf16)
    fresh = torch.randn(new, 1, latent + rotary, device=budget.device, dtype=bf16)
    pages = -(-prefix // page)
    pool = torch.randn(pages * page, 1, latent + rotary, device=budget.device, dtype=bf16)
    options = {
        "cu_seqlens": torch.tensor([0, new], dtype=torch.int32, device=budget.device),
        "page_table": torch.randperm(pages, device=budget.device).int().view(1, pages),
        "prefix_lens": torch.tensor([prefix], dtype=torch.int32, device=budget.device),
    }

    def absorbed() -> torch.Tensor:
        return prefill_attention(
            queries, fresh, None, k_pool=pool, page_size=page, value_width=latent, scale=192**-0.5, **options
        )

    flops = 2 * new * (prefix + new // 2) * heads * (2 * latent + rotary)
    name = f"MLA absorbed, {heads} heads, {new} tokens after {prefix} in pages"
    rows.append({"name": name, "absent": [], "flops": flops, "arms": [Arm("prfaas", absorbed)]})
    report = []
    for row in rows:
        times = measure(row["arms"], device=budget.device, warmups=budget.warmups, iterations=budget.iterations)
        report.append(
            {
                "name": row["name"],
                "absent": row["absent"],
                "times": {arm: value._asdict() for arm, value in times.items()},
                "tflops": {arm: row["flops"] / (value.median_ms / 1e3) / 1e12 for arm, value in times.items()},
            }
        )
    return report


def pack_rows_figures(copy_rate: float, budget: Budget, *, smoke: bool) -> list[dict[str, Any]]:
    """MLA latents and states of all layers, plain and quantised: bytes moved per second as a share of the copy rate."""
    layers, pages, page, slots = (2, 6, 4, 3) if smoke else (27, 1024, 64, 64)
    pools = [torch.randn(pages * page, 576, device=budget.device, dtype=torch.bfloat16) for _ in range(layers)]
    states = [torch.randn(slots, 2 if smoke else 32, 128, 128, device=budget.device) for _ in range(layers)]
    latents, state = PoolTable.of(pools, page_size=page), PoolTable.of(states)
    picked = torch.randperm(pages, device=budget.device)[: pages // 2].int()
    chosen = torch.randperm(slots, device=budget.device)[: max(1, slots // 4)].int()
    packed, packed_state = pack_rows(latents, picked), pack_rows(state, chosen)
    arms: list[tuple[Arm, int]] = [
        (Arm("pack latents", lambda: pack_rows(latents, picked, packed)), 2 * packed.numel()),
        (Arm("unpack latents", lambda: unpack_rows(latents, picked, packed)), 2 * packed.numel()),
        (Arm("pack states", lambda: pack_rows(state, chosen, packed_state)), 2 * packed_state.numel()),
        (Arm("unpack states", lambda: unpack_rows(state, chosen, packed_state)), 2 * packed_state.numel()),
    ]
    for code in (torch.int8, torch.float8_e4m3fn):
        small = quantise_rows(latents, picked, width=576, code=code)
        moved = packed.numel() + small.numel()

        def quantise(code: torch.dtype = code, small: torch.Tensor = small) -> None:
            quantise_rows(latents, picked, width=576, code=code, out=small)

        def dequantise(code: torch.dtype = code, small: torch.Tensor = small) -> None:
            dequantise_rows(latents, picked, small, width=576, code=code)

        name = str(code).removeprefix("torch.")
        arms += [(Arm(f"quantise {name}", quantise), moved), (Arm(f"dequantise {name}", dequantise), moved)]
    times = measure(
        [arm for arm, _ in arms], device=budget.device, warmups=min(5, budget.warmups), iterations=budget.iterations
    )
    return [
        {
            "name": arm.name,
            "ms": times[arm.name].median_ms,
            "bytes": moved,
            "share_of_copy_rate": moved / (times[arm.name].median_ms / 1e3) / copy_rate,
        }
        for arm, moved in arms
    ]


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
