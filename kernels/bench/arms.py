"""The contenders of a KDA prefill: ours and, where it can be imported, fla-core; the same inputs and semantics."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import torch
from checks import kda_inputs
from prfaas_kernels.common.tuning import Settings
from timing import Arm

WIDTH = 128


def case(tokens: int, heads: int, sequences: int) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """bfloat16 inputs, ``cu_seqlens`` of equal sequences, initial states ``[N, H, V, K]`` float32."""
    x = kda_inputs(tokens, heads, heads, WIDTH, torch.bfloat16, "cuda")
    cu = torch.arange(0, sequences + 1, device="cuda", dtype=torch.int32) * (tokens // sequences)
    return x, cu, torch.randn(sequences, heads, WIDTH, WIDTH, device="cuda") * 0.1


def ours(x: dict[str, torch.Tensor], cu: torch.Tensor, initial: torch.Tensor, settings: Settings | None = None) -> Arm:
    """Raw gate and beta, strided q, k, v, state updated in place."""
    from prfaas_kernels.kda.chunk_triton import chunk_kda

    pool = initial.clone()
    slots = torch.arange(initial.shape[0], dtype=torch.int32, device="cuda")

    def run() -> Any:
        return chunk_kda(**x, beta_is_raw=True, state_pool=pool, cache_indices=slots, cu_seqlens=cu, settings=settings)

    return Arm("prfaas", run, lambda: pool.copy_(initial))


def fla(x: dict[str, torch.Tensor], cu: torch.Tensor, initial: torch.Tensor) -> Arm | str:
    """fla-core's ``chunk_kda``, or why it takes no part."""
    try:
        from fla.ops.kda import chunk_kda
    except ImportError as error:
        return f"fla-core is not installed ({error})"
    state = initial.mT.contiguous()
    marks = cu.long()

    def run() -> Any:
        return chunk_kda(
            q=x["q"],
            k=x["k"],
            v=x["v"],
            g=x["g"],
            beta=x["beta"].sigmoid(),
            A_log=x["a_log"],
            dt_bias=x["dt_bias"],
            initial_state=state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            cu_seqlens=marks,
        )

    try:
        run()
    except Exception as error:  # noqa: BLE001  (whatever it raises is the reason that the report prints)
        return f"fla-core {importlib.metadata.version('fla-core')} failed: {error!r}"
    return Arm("fla " + importlib.metadata.version("fla-core"), run, lambda: None)
