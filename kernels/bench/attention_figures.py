"""What is measured of full attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from figures import Budget
from prfaas_kernels.full_attention import prefill_attention
from rivals import sglang_attention, that_run
from timing import Arm, measure


def attention_rows(budget: Budget, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Prefill attention: GQA without prefix against torch's fused kernels, absorbed MLA over a paged prefix alone."""
    yield _row(*_gqa(budget, smoke=smoke), budget)
    yield _row(*_absorbed_mla(budget, smoke=smoke), budget)


def _row(name: str, flops: int, arms: list[Arm], absent: list[str], budget: Budget) -> dict[str, Any]:
    times = measure(arms, device=budget.device, warmups=budget.warmups, iterations=budget.iterations)
    return {
        "name": name,
        "absent": absent,
        "times": {arm: value._asdict() for arm, value in times.items()},
        "tflops": {arm: flops / (value.median_ms / 1e3) / 1e12 for arm, value in times.items()},
    }


def _gqa(budget: Budget, *, smoke: bool) -> tuple[str, int, list[Arm], list[str]]:
    tokens, heads, key_heads, width = (70, 4, 2, 32) if smoke else (8192, 32, 8, 128)
    q = torch.randn(tokens, heads, width, device=budget.device, dtype=torch.bfloat16)
    k, v = (torch.randn(tokens, key_heads, width, device=budget.device, dtype=torch.bfloat16) for _ in range(2))
    cu = torch.tensor([0, tokens], dtype=torch.int32, device=budget.device)
    batched = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
    others, absent = that_run((sglang_attention,), q, k, v, cu, tokens)
    arms = [
        Arm("prfaas", lambda: prefill_attention(q, k, v, cu_seqlens=cu)),
        Arm(
            "torch sdpa",
            lambda: torch.nn.functional.scaled_dot_product_attention(*batched, is_causal=True, enable_gqa=True),
        ),
        *others,
    ]
    return f"GQA {heads}/{key_heads} heads, {tokens} tokens", 2 * tokens * tokens * heads * width, arms, absent


def _absorbed_mla(budget: Budget, *, smoke: bool) -> tuple[str, int, list[Arm], list[str]]:
    new, prefix, heads, latent, rotary, page = (20, 70, 4, 32, 16, 16) if smoke else (1024, 32768, 16, 512, 64, 64)
    pages, on = -(-prefix // page), {"device": budget.device, "dtype": torch.bfloat16}
    queries = torch.randn(new, heads, latent + rotary, **on)
    fresh, pool = (torch.randn(rows, 1, latent + rotary, **on) for rows in (new, pages * page))
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
    return name, flops, [Arm("prfaas", absorbed)], []
