"""What is measured of packing."""

from __future__ import annotations

from typing import Any

import torch
from figures import Budget
from prfaas_kernels.kv_pack import PoolTable, dequantise_rows, pack_rows, quantise_rows, unpack_rows
from timing import Arm, measure


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
