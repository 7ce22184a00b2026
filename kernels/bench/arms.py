"""Ours of each operator, and the inputs that ours and its rivals share.

All start from strided views of one tensor, as SGLang's models hand them over: copies that an arm needs are its time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from checks import kda_inputs
from prfaas_kernels.common.tuning import Settings
from timing import Arm


class Case(NamedTuple):
    """bfloat16 inputs ``x`` (see :func:`checks.kda_inputs`), ``cu`` ``[N+1]``, initial states ``[N, H, V, K]``."""

    x: dict[str, torch.Tensor]
    cu: torch.Tensor
    initial: torch.Tensor


def make_case(tokens: int, heads: int, lengths: list[int], device: str, width: int = 128) -> Case:
    """``lengths`` of the sequences, ``tokens`` in sum."""
    x = kda_inputs(tokens, heads, heads, width, torch.bfloat16, device)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device, dtype=torch.int32)
    return Case(x, cu, torch.randn(len(lengths), heads, width, width, device=device) * 0.1)


def slots_of(case: Case) -> torch.Tensor:
    """Slot n for sequence n."""
    return torch.arange(case.initial.shape[0], dtype=torch.int32, device=case.initial.device)


def gdn_gates(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """GDN's log decay, from one channel of KDA's gate, and its activated beta, both ``[1, T, H]`` float32."""
    return -torch.nn.functional.softplus(case.x["g"][..., 0].float()), case.x["beta"].float().sigmoid()


def lightning_qkv(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``[T, H, D]`` each."""
    return case.x["q"][0], case.x["k"][0], case.x["v"][0]


def lightning_slopes(case: Case) -> torch.Tensor:
    """``2^(-8 (h + 1) / H)`` for head h of H."""
    heads = case.initial.shape[1]
    return torch.exp2(-8.0 / heads * torch.arange(1, heads + 1, device=case.initial.device))


def kda_ours(case: Case, settings: Settings | None = None, segment_chunks: int | None = None) -> Arm:
    """Raw gate and beta, state updated in place."""
    from prfaas_kernels.kda.chunk_triton import KdaInputs, chunk_kda

    pool = case.initial.clone()
    inputs = KdaInputs(**case.x, beta_is_raw=True, state_pool=pool, cache_indices=slots_of(case), cu_seqlens=case.cu)

    def run() -> Any:
        return chunk_kda(inputs, settings=settings, segment_chunks=segment_chunks)

    return Arm("prfaas serial" if segment_chunks == 0 else "prfaas", run, lambda: pool.copy_(case.initial))


def gdn_ours(case: Case) -> Arm:
    """Log decay and activated beta, state updated in place."""
    from prfaas_kernels.gdn.chunk_triton import GdnInputs, chunk_gdn

    pool, (log_decay, beta) = case.initial.clone(), gdn_gates(case)
    inputs = GdnInputs(
        **{name: case.x[name] for name in "qkv"},
        log_decay=log_decay,
        beta=beta,
        state_pool=pool,
        cache_indices=slots_of(case),
        cu_seqlens=case.cu,
    )
    return Arm("prfaas", lambda: chunk_gdn(inputs), lambda: pool.copy_(case.initial))


def lightning_ours(case: Case) -> Arm:
    """A fixed decay for each head, state updated in place."""
    from prfaas_kernels.lightning.chunk_triton import LightningInputs, chunk_lightning

    pool, (q, k, v) = case.initial.clone(), lightning_qkv(case)
    inputs = LightningInputs(
        q=q,
        k=k,
        v=v,
        slopes=lightning_slopes(case),
        state_pool=pool,
        cache_indices=slots_of(case),
        cu_seqlens=case.cu,
    )
    return Arm("prfaas", lambda: (chunk_lightning(inputs).unsqueeze(0),), lambda: pool.copy_(case.initial))


#: Operator -> ours.
OURS: dict[str, Callable[[Case], Arm]] = {"kda": kda_ours, "gdn": gdn_ours, "lightning": lightning_ours}
